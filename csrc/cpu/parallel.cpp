// torch's OpenMP workers spin for a while after each region. A second pool would fight them for the cores, so this file
// finds the OpenMP runtime that torch has loaded and opens its regions there, through GOMP_parallel: libgomp's stable
// entry point, which LLVM's and Intel's runtimes offer too. Nothing is linked: where none is found, or in a child of
// fork() (an OpenMP runtime does not survive it), a pool of parked std::threads does the work.
#include "cpu/parallel.hpp"

#include <dlfcn.h>
#include <pthread.h>
#ifdef __linux__
#include <link.h>
#endif

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

namespace anabranch::cpu {
namespace {

using Entry = void (*)(void*);
using GompParallel = void (*)(Entry, void*, unsigned, unsigned);

class Pool {
 public:
  void run(int threads, Entry fn, void* arg) {
    std::unique_lock<std::mutex> use(use_, std::try_to_lock);
    if (!use.owns_lock() || threads <= 1) return fn(arg);  // another thread's region has the workers
    {
      std::lock_guard<std::mutex> guard(mutex_);
      while (int(workers_) < threads - 1) {
        ++workers_;
        std::thread([this] { work(); }).detach();
      }
      fn_ = fn;
      arg_ = arg;
      wanted_ = running_ = threads - 1;
    }
    wake_.notify_all();
    fn(arg);
    std::unique_lock<std::mutex> lock(mutex_);
    running_ -= wanted_;  // workers that have not started have nothing left to do
    wanted_ = 0;
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      Entry fn = fn_;
      void* arg = arg_;
      lock.unlock();
      fn(arg);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex use_, mutex_;
  std::condition_variable wake_, done_;
  Entry fn_ = nullptr;
  void* arg_ = nullptr;
  int workers_ = 0, wanted_ = 0, running_ = 0;
};

std::atomic<Pool*> own_pool{nullptr};  // never destroyed: its threads may outlive main()
std::atomic<bool> forked{false};

Pool& pool() {
  Pool* p = own_pool.load();
  if (p) return *p;
  Pool* fresh = new Pool;
  if (own_pool.compare_exchange_strong(p, fresh)) return *fresh;
  delete fresh;
  return *p;
}

struct Runtime {
  GompParallel parallel = nullptr;
  std::string info;
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
  void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
#ifdef __linux__
  std::string torch;
  dl_iterate_phdr(remember_torch, &torch);
  if (!symbol && !torch.empty()) {
    if (void* library = dlopen(torch.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
      symbol = dlsym(library, "GOMP_parallel");
      dlclose(library);  // torch itself keeps it loaded
    }
  }
#endif
  Dl_info where;
  if (symbol && dladdr(symbol, &where) && where.dli_fname) {
    found.parallel = reinterpret_cast<GompParallel>(symbol);
    found.info = std::string("torch's OpenMP (") + where.dli_fname + ")";
  } else {
    found.info = "own pool (no OpenMP runtime with GOMP_parallel is loaded)";
  }
  return found;
}

// Looked for at the first region, when torch is certainly loaded.
const Runtime& runtime() {
  static const Runtime* found = [] {
    pthread_atfork(nullptr, nullptr, [] {
      forked = true;
      own_pool = nullptr;  // its threads stayed in the parent
    });
    return new Runtime(find_runtime());
  }();
  return *found;
}

}  // namespace

void parallel(int threads, Entry fn, void* arg) {
  if (threads <= 1) return fn(arg);
  const Runtime& r = runtime();
  if (r.parallel && !forked)
    r.parallel(fn, arg, unsigned(threads), 0);
  else
    pool().run(threads, fn, arg);
}

std::string parallel_info() {
  const Runtime& r = runtime();
  return forked ? "own pool (this process was forked)" : r.info;
}

}  // namespace anabranch::cpu
