// What the emulator adds to anabranch._cuda's own bindings: its settings, its memory checks, its counts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch.hpp"
#include "cuda/ptx.cuh"
#include "emulator.hpp"
#include "probes.hpp"

namespace py = pybind11;

namespace anabranch::cuda {

// Shared memory of an A100, few multiprocessors: several units a block, as on a GPU under load. The second device is older.
Device device_of(int index) { return {index == 0 ? 90 : 80, 3, 163 * 1024, 164 * 1024}; }
int device_count() { return 1; }
std::string architectures() { return "the emulator"; }

}  // namespace anabranch::cuda

void bind_emulator(py::module_& m) {
  m.def("probe", &run_probe, py::arg("name"), py::arg("data"), py::arg("n") = 0, py::arg("grid") = 1);
  using namespace emulator;
  py::register_exception<Trap>(m, "Trap", PyExc_RuntimeError);
  m.def(
      "configure",
      [](uint64_t seed, const std::string& landing, const std::string& schedule, int planted) {
        Config c;
        c.seed = seed;
        c.landing = landing == "at_once" ? Landing::at_once : landing == "late" ? Landing::late : Landing::random;
        c.schedule = schedule == "sticky" ? Schedule::sticky : Schedule::uniform;
        c.planted = planted;
        configure(c);
      },
      py::arg("seed") = 0, py::arg("landing") = "random", py::arg("schedule") = "uniform", py::arg("planted") = 0);
  m.def(
      "register_memory",
      [](uintptr_t address, size_t bytes, bool writable, const std::string& name) {
        register_memory(reinterpret_cast<void*>(address), bytes, writable, name);
      },
      py::arg("address"), py::arg("bytes"), py::arg("writable"), py::arg("name"));
  m.def("forget_memory", &forget_memory);
  m.def("reset_statistics", &reset_statistics);
  m.def("statistics", [] {
    const Statistics& s = statistics();
    py::dict d;
    d["launches"] = s.launches;
    d["blocks"] = s.blocks;
    d["switches"] = s.switches;
    d["mma"] = s.mma;
    d["copies"] = s.copies;
    d["beside"] = s.beside;
    d["cached"] = s.cached;
    d["copy_instructions"] = s.copy_instructions;
    d["copy_wavefronts"] = s.copy_wavefronts;
    d["copy_sectors"] = s.copy_sectors;
    d["ldmatrix"] = s.ldmatrix;
    d["ldmatrix_wavefronts"] = s.ldmatrix_wavefronts;
    d["most_in_flight"] = s.most_in_flight;
    d["sites"] = s.sites;
    d["loads"] = s.loads;
    return d;
  });
  py::dict sites;
  using anabranch::cuda::Site;
  const auto add = [&](const char* name, Site site) { sites[name] = int(site); };
  add("window_reduced", Site::window_reduced);
  add("places_visible", Site::places_visible);
  add("queries_landed", Site::queries_landed);
  add("queries_visible", Site::queries_visible);
  add("tile_landed", Site::tile_landed);
  add("tile_visible", Site::tile_visible);
  add("ring_done", Site::ring_done);
  add("results_visible", Site::results_visible);
  add("ahead_landed", Site::ahead_landed);
  add("ahead_visible", Site::ahead_visible);
  add("launch_before", Site::launch_before);
  if (int(py::len(sites)) != int(Site::count) - 1) throw std::logic_error("a site has no name");
  m.attr("SITES") = sites;
}
