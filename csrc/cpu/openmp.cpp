// Nothing is linked: the wheel must work with whatever runtime torch brings, and a second one would have threads of its
// own. omp_set_num_threads is said for the calling thread alone, unlike torch.set_num_threads, which other threads of the
// program would inherit.
#include "cpu/openmp.hpp"

#include <dlfcn.h>
#ifdef __linux__
#include <link.h>
#endif

#include <cstring>

namespace anabranch::cpu {
namespace {

struct Runtime {
  int (*threads)() = nullptr;
  void (*set_threads)(int) = nullptr;
  std::string path;
};

#ifdef __linux__
int remember_torch(dl_phdr_info* info, size_t, void* path) {
  const char* name = info->dlpi_name ? info->dlpi_name : "";
  if (!strstr(name, "libtorch_cpu.so")) return 0;
  *static_cast<std::string*>(path) = name;
  return 1;
}
#endif

Runtime find_runtime() {
  Runtime found;
  // The order in which torch's own symbols were bound: the global scope, then libtorch_cpu's dependencies.
  void* set = dlsym(RTLD_DEFAULT, "omp_set_num_threads");
  void* get = dlsym(RTLD_DEFAULT, "omp_get_max_threads");
#ifdef __linux__
  std::string torch;
  dl_iterate_phdr(remember_torch, &torch);
  if (!set && !torch.empty()) {
    if (void* library = dlopen(torch.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
      set = dlsym(library, "omp_set_num_threads");
      get = dlsym(library, "omp_get_max_threads");
      dlclose(library);  // torch itself keeps it loaded
    }
  }
#endif
  Dl_info where;
  if (set && get && dladdr(set, &where) && where.dli_fname) {
    found.threads = reinterpret_cast<int (*)()>(get);
    found.set_threads = reinterpret_cast<void (*)(int)>(set);
    found.path = where.dli_fname;
  }
  return found;
}

// Looked for at the first call, when torch is certainly loaded.
const Runtime& runtime() {
  static const Runtime* found = new Runtime(find_runtime());
  return *found;
}

}  // namespace

int openmp_threads(int threads) {
  const Runtime& r = runtime();
  if (!r.set_threads) return 0;
  const int before = r.threads();
  if (threads > 0 && threads != before) r.set_threads(threads);
  return before;
}

std::string openmp_library() { return runtime().path; }

}  // namespace anabranch::cpu
