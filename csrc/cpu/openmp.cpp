// Nothing is linked: the wheel must work with whatever runtime torch brings, and a second one would have threads of its
// own. omp_set_num_threads is said for the calling thread alone, unlike torch.set_num_threads, which other threads of the
// program would inherit.
#include "cpu/openmp.hpp"

#include <dlfcn.h>
#include <pthread.h>
#ifdef __linux__
#include <link.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

#include "cpu/clocks.hpp"

namespace anabranch::cpu {
namespace {

struct Runtime {
  int (*threads)() = nullptr;
  void (*set_threads)(int) = nullptr;
  int (*inside)() = nullptr;
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;  // GCC's own entry; clang's runtimes have it too
  std::string path;
};

// In a child of fork() the team is gone, which GCC's runtime does not notice: it would wait for it for ever.
std::atomic<bool> forked{false};

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
  void* library = RTLD_DEFAULT;
#ifdef __linux__
  std::string torch;
  dl_iterate_phdr(remember_torch, &torch);
  if (!dlsym(RTLD_DEFAULT, "omp_set_num_threads") && !torch.empty()) {
    library = dlopen(torch.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library) dlclose(library);  // torch itself keeps it loaded
  }
#endif
  void* set = dlsym(library, "omp_set_num_threads");
  void* get = dlsym(library, "omp_get_max_threads");
  Dl_info where;
  if (set && get && dladdr(set, &where) && where.dli_fname) {
    found.threads = reinterpret_cast<int (*)()>(get);
    found.set_threads = reinterpret_cast<void (*)(int)>(set);
    found.inside = reinterpret_cast<int (*)()>(dlsym(library, "omp_in_parallel"));
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
    found.path = where.dli_fname;
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
  }
  return found;
}

// Looked for at the first call, when torch is certainly loaded.
const Runtime& runtime() {
  static const Runtime* found = new Runtime(find_runtime());
  return *found;
}

#ifdef __linux__
// What is known of a calling thread's team: the processor time that each of its other threads has taken, and when.
class Watch {
 public:
  bool awake(int threads) {
    const int64_t now = nanoseconds(CLOCK_MONOTONIC);
    if (int(clocks_.size()) != threads - 1) return look_again(threads, now);
    if (now < next_) return awake_;
    int64_t least = INT64_MAX;
    for (size_t i = 0; i < clocks_.size(); ++i) {
      const int64_t spent = nanoseconds(clocks_[i]);
      if (spent < 0) return look_again(threads, now);  // it has ended: the team was made smaller and larger again
      least = std::min(least, spent - spent_[i]);
      spent_[i] = spent;
    }
    // The share is that of the whole time since the last look: behind a pause they count as asleep until the next one.
    awake_ = least * 100 > (now - since_) * HELD;
    since_ = now;
    next_ = now + SHORTEST;
    return awake_;
  }

 private:
  // Nanoseconds from one look to the next, which is a system call per thread; and behind a region of this class's own,
  // until the spinning that it caused has ended.
  static constexpr int64_t SHORTEST = 300'000, SETTLE = 20'000'000;
  static constexpr int64_t HELD = 85;  // per cent of the time; another program on the core leaves about 50

  bool look_again(int threads, int64_t now) {
    clocks_.clear();
    openmp_region([](void* watch) { static_cast<Watch*>(watch)->add(); }, this);
    spent_.clear();
    for (clockid_t clock : clocks_) spent_.push_back(nanoseconds(clock));
    since_ = now;
    next_ = now + SETTLE;
    if (int(clocks_.size()) != threads - 1) clocks_.clear();  // it gave fewer threads than it said
    return awake_ = false;
  }

  void add() {
    clockid_t clock;
    if (pthread_equal(pthread_self(), caller_) || pthread_getcpuclockid(pthread_self(), &clock) != 0) return;
    std::lock_guard<std::mutex> held(adding_);
    clocks_.push_back(clock);
  }

  const pthread_t caller_ = pthread_self();
  std::mutex adding_;
  std::vector<clockid_t> clocks_;
  std::vector<int64_t> spent_;
  int64_t since_ = 0, next_ = 0;
  bool awake_ = false;
};
#endif

}  // namespace

int openmp_threads(int threads) {
  const Runtime& r = runtime();
  if (!r.set_threads) return 0;
  const int before = r.threads();
  if (threads > 0 && threads != before) r.set_threads(threads);
  return before;
}

bool has_openmp_regions() {
  const Runtime& r = runtime();
  return r.parallel && r.inside && !forked.load(std::memory_order_relaxed);
}

void openmp_region(void (*fn)(void*), void* arg) {
  const Runtime& r = runtime();
  r.parallel(fn, arg, unsigned(std::max(1, r.threads())), 0);
}

bool openmp_awake([[maybe_unused]] int threads) {
#ifdef __linux__
  const Runtime& r = runtime();
  if (!has_openmp_regions() || r.threads() < threads || r.inside()) return false;
  static thread_local Watch watch;
  return watch.awake(r.threads());
#else
  return false;
#endif
}

std::string openmp_library() { return runtime().path; }

}  // namespace anabranch::cpu
