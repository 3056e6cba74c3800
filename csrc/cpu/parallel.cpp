// The pool, and why it is one of our own.
//
// OpenMP's regions end with a barrier for all threads of the team. Where another program runs on one of the cores, each
// region then waits until the thread of that core gets its turn again, some milliseconds for some microseconds of work:
// one such program cost three quarters of the speed. Here a worker takes part by claiming a piece, and a worker that is
// asleep, late or descheduled has claimed none.
//
// How long idle threads spin. A decode step is hundreds of regions of 5 to 100 µs with gaps of 5 to 200 µs (Python, and
// torch's small operators); waking a sleeping thread costs the caller a system call and comes 10 to 50 µs late. So a
// worker spins for SPIN after its last piece, the longer of the gaps, and then sleeps: between steps, and as soon as
// torch's own threads have a longer piece of work, it is off its core. A spinning worker is also charged for it: where
// others want the core, the system would take it away when there is work again. So a worker that another program took a
// turn from sleeps at once for the next while (CROWDED, and longer each time that it happens again as soon as it spins);
// one that has slept is put on a core soon after it is woken. The caller spins for LINGER, a common piece, and then
// sleeps too: its core is then free for whoever holds the last piece, and a scheduler that finds a core idle moves such a
// thread there.
//
// And when OpenMP's threads run a region all the same. Behind a region of torch's they spin for milliseconds, on every
// core: a kernel of ours between two linear layers of torch's then runs on the caller's core alone, its workers having
// none (benchmarks/loop.py). So while they hold their cores (openmp_awake) they are given the pieces.
// Somebody else on one of the cores shows in the processor time that they get, and then it is the pool's turn again.
#include "cpu/parallel.hpp"

#include <pthread.h>
#ifdef __linux__
#include <sys/resource.h>
#endif
#ifndef _WIN32
#include <signal.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "cpu/clocks.hpp"
#include "cpu/futex.hpp"
#include "cpu/openmp.hpp"

namespace anabranch::cpu {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr microseconds SPIN{200}, LINGER{30}, CROWDED{50000}, MOST_CROWDED{400000};
constexpr microseconds TURN{1000}, WINDOW{10000};  // lost within a window: somebody's turn
constexpr int REGIONS = 8;        // open at once; a further caller works alone
constexpr int MOST_WORKERS = 1023;
constexpr uint32_t CLOSED = UINT32_MAX;  // as the next piece of a region

std::atomic<int64_t> delay_before{0}, delay_inside{0};  // microseconds, in tests

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() or for `limit`; whether done() came true.
template <class Done>
bool spin(microseconds limit, Done done) {
  const auto end = Clock::now() + limit;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      relax();
    }
  } while (Clock::now() < end);
  return done();
}

void wait_out(std::atomic<int64_t>& delay) {
  const auto begin = Clock::now();
  while (Clock::now() - begin < microseconds(delay.load())) std::this_thread::sleep_for(microseconds(50));
}

// Workers are numbered from 1, as `thread` of their pieces; futexes know them by one of 32 bits.
uint32_t bit_of(int worker) { return 1u << (worker % 32); }
uint32_t bits_below(int threads) { return threads > 32 ? UINT32_MAX : uint32_t((uint64_t(1) << threads) - 1) & ~1u; }

// One open region. Its memory belongs to the pool and is never freed: a late worker may look at it at any time.
struct alignas(64) Region {
  // High half: which region this is, counted up; low half: the next piece to be claimed. A claim is a compare-and-swap of
  // both, so a worker that read the fields below of another region than it swaps fails.
  std::atomic<uint64_t> ticket{CLOSED};
  std::atomic<uint32_t> ended{0};  // pieces
  std::atomic<uint32_t> count{0};
  std::atomic<int> threads{0};
  std::atomic<Piece> fn{nullptr};
  std::atomic<void*> arg{nullptr};
  std::atomic<bool> asleep{false};  // the caller
  std::atomic<bool> failed{false};
  std::atomic<bool> used{false};  // by a caller
  std::exception_ptr error;       // written by whoever set `failed`

  // Claims and runs pieces until there are none left; whether there was one.
  bool work(int thread) {
    bool any = false;
    for (;;) {
      uint64_t seen = ticket.load(std::memory_order_acquire);
      const uint32_t next = uint32_t(seen);
      if (next == CLOSED) return any;
      // Acquire: who reads fields of a later region here also sees that this one was closed, and fails below.
      const uint32_t all = count.load(std::memory_order_acquire);
      const Piece run = fn.load(std::memory_order_acquire);
      void* const with = arg.load(std::memory_order_acquire);
      if (next >= all || thread >= threads.load(std::memory_order_acquire)) return any;
      if (thread && delay_before.load(std::memory_order_relaxed)) wait_out(delay_before);
      if (!ticket.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
      any = true;
      if (thread && delay_inside.load(std::memory_order_relaxed)) wait_out(delay_inside);
      if (!failed.load(std::memory_order_relaxed)) {
        try {
          run(with, thread, next);
        } catch (...) {
          if (!failed.exchange(true)) error = std::current_exception();
        }
      }
      // The caller may return from here on. seq_cst, as its look at `ended` behind `asleep`: one of the two sees the other.
      if (ended.fetch_add(1) + 1 == all && asleep.load()) wake(ended, 1);
    }
  }

  void run(int with_threads, uint32_t pieces, Piece piece, void* with) {
    const uint64_t mine = (ticket.load(std::memory_order_relaxed) >> 32) + 1;
    ended.store(0, std::memory_order_relaxed);
    failed.store(false, std::memory_order_relaxed);
    threads.store(with_threads, std::memory_order_release);
    fn.store(piece, std::memory_order_release);
    arg.store(with, std::memory_order_release);
    count.store(pieces, std::memory_order_release);
    ticket.store(mine << 32, std::memory_order_release);
  }

  void finish() {
    work(0);
    const uint32_t all = count.load(std::memory_order_relaxed);
    const auto done = [&] { return ended.load() == all; };
    if (!done() && !spin(LINGER, done)) {
      asleep.store(true);
      for (uint32_t so_far; (so_far = ended.load()) != all;) sleep_while(ended, so_far, 1);
      asleep.store(false);
    }
    const uint64_t seen = ticket.load(std::memory_order_relaxed);
    ticket.store(seen | CLOSED, std::memory_order_release);  // before a field changes
  }
};

// What others take of a worker's core: the time that it was ready to run and did not. The system's own work takes some
// dozens of microseconds of it now and then; a program that wants the core too, a whole turn, which is milliseconds.
class Company {
 public:
  // Whether a turn was taken lately.
  bool crowded() {
    const auto now = Clock::now();
    if (const int64_t times = displaced(); times != times_) {
      times_ = times;
      const auto lost = now - since_ - (busy() - busy_) - slept_;
      if (lost > TURN) {
        // Again as soon as it spun: whoever it is stays. (torch's own threads take turns too, while a prompt is read.)
        if (now >= until_) pause_ = now - until_ < WINDOW ? std::min(2 * pause_, MOST_CROWDED) : CROWDED;
        until_ = now + pause_;
      }
      if (lost > TURN || now - since_ > WINDOW) restart(now);
    }
    return now < until_;
  }

  template <class Sleep>
  void asleep(Sleep sleep) {
    const auto begin = Clock::now();
    sleep();
    slept_ += Clock::now() - begin;
  }

 private:
  void restart(Clock::time_point now) {
    since_ = now;
    busy_ = busy();
    slept_ = {};
  }

  // How often the system has taken this thread off its core for another.
  static int64_t displaced() {
#if defined(__linux__) && defined(RUSAGE_THREAD)
    rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
#else
    return 0;
#endif
  }

  // The processor time of this thread.
  static std::chrono::nanoseconds busy() {
#ifdef __linux__
    return std::chrono::nanoseconds(nanoseconds(CLOCK_THREAD_CPUTIME_ID));
#else
    return {};
#endif
  }

  int64_t times_ = displaced();
  Clock::time_point since_ = Clock::now(), until_{};
  std::chrono::nanoseconds busy_ = busy();
  microseconds pause_ = CROWDED;
  Clock::duration slept_{};
};

class Pool {
 public:
  void run(int threads, uint32_t pieces, Piece fn, void* arg) {
    Region* region = nullptr;
    for (Region& r : regions_) {
      if (!r.used.load(std::memory_order_relaxed) && !r.used.exchange(true, std::memory_order_acquire)) {
        region = &r;
        break;
      }
    }
    if (!region) {
      for (uint32_t i = 0; i < pieces; ++i) fn(arg, 0, i);
      return;
    }
    start(threads - 1);
    region->run(threads, pieces, fn, arg);
    // seq_cst, as a worker's count of itself before it looks at the bell: one of the two sees the other.
    bell_.fetch_add(1);
    if (sleepers_.load() > 0) wake(bell_, bits_below(threads));
    region->finish();
    std::exception_ptr error;
    if (region->failed.load(std::memory_order_relaxed)) std::swap(error, region->error);
    region->used.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
  }

  int workers() const { return workers_.load(); }

 private:
  void start(int wanted) {
    wanted = std::min(wanted, MOST_WORKERS);
    if (workers_.load(std::memory_order_relaxed) >= wanted) return;
    std::unique_lock<std::mutex> lock(starting_, std::try_to_lock);
    if (!lock.owns_lock()) return;  // another caller is at it
#ifndef _WIN32
    sigset_t all, before;  // signals are for the program's own threads; a new one inherits the mask
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
    try {
      for (int id = workers_.load() + 1; id <= wanted; ++id) {
        std::thread([this, id] { live(id); }).detach();
        workers_.store(id);
      }
    } catch (const std::system_error&) {
      // No more threads to be had (a limit on processes): those there are will do, and the caller alone too.
    }
#ifndef _WIN32
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
  }

  void live(int id) {
#ifdef __linux__
    pthread_setname_np(pthread_self(), "anabranch");
#endif
    Company company;
    for (;;) {
      const uint32_t rung = bell_.load(std::memory_order_acquire);
      bool any = false;
      for (Region& r : regions_) any |= r.work(id);
      if (any) continue;
      const auto rings = [&] { return bell_.load(std::memory_order_acquire) != rung; };
      if (!company.crowded() && spin(SPIN, rings)) continue;
      sleepers_.fetch_add(1);
      company.asleep([&] { sleep_while(bell_, rung, bit_of(id)); });
      sleepers_.fetch_sub(1);
    }
  }

  Region regions_[REGIONS];
  alignas(64) std::atomic<uint32_t> bell_{0};  // changes with every region
  std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<int> workers_{0};
  std::mutex starting_;
};

std::atomic<Pool*> the_pool{nullptr};  // never destroyed: its threads may outlive main()

Pool& pool() {
  Pool* p = the_pool.load(std::memory_order_acquire);
  if (p) return *p;
  static std::once_flag once;
  std::call_once(once, [] {
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] { the_pool = nullptr; });  // in the child: the threads stayed with the parent
#endif
  });
  Pool* fresh = new Pool;
  if (the_pool.compare_exchange_strong(p, fresh)) return *fresh;
  delete fresh;
  return *p;
}

// A region on OpenMP's threads: its pieces are claimed as those of the pool are; its end waits for the whole team.
class Team {
 public:
  Team(int threads, int64_t count, Piece fn, void* arg) : threads_(threads), count_(count), fn_(fn), arg_(arg) {}

  void run() {
    openmp_region([](void* team) { static_cast<Team*>(team)->work(); }, this);
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void work() {
    const int thread = members_.fetch_add(1);  // the team may be larger than the region: a smaller one would be made anew
    if (thread >= threads_) return;
    for (int64_t piece; !failed_.load() && (piece = next_.fetch_add(1)) < count_;) {
      try {
        fn_(arg_, thread, piece);
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
    }
  }

  const int threads_;
  const int64_t count_;
  const Piece fn_;
  void* const arg_;
  std::atomic<int> members_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // written by whoever set `failed_`, read behind the end of the region
};

std::atomic<Threads> whose{Threads::AUTO};
std::atomic<int64_t> teams{0};  // regions that OpenMP's threads have run

bool on_openmp(int threads) {
  switch (whose.load(std::memory_order_relaxed)) {
    case Threads::POOL: return false;
    case Threads::OPENMP: return has_openmp_regions();
    default: return openmp_awake(threads);
  }
}

}  // namespace

Threads choose_threads(Threads wanted) { return whose.exchange(wanted); }

void parallel(int threads, int64_t count, Piece fn, void* arg) {
  if (threads <= 1 || count <= 1 || count >= int64_t(CLOSED)) {
    for (int64_t i = 0; i < count; ++i) fn(arg, 0, i);
    return;
  }
  if (on_openmp(threads)) {
    teams.fetch_add(1, std::memory_order_relaxed);
    return Team(threads, count, fn, arg).run();
  }
  pool().run(threads, uint32_t(count), fn, arg);
}

int64_t openmp_regions() { return teams.load(); }

std::string parallel_info() {
  const Pool* p = the_pool.load();
  return "own pool, " + std::to_string(p ? p->workers() : 0) + " workers started";
}

void delay_workers(int64_t before_us, int64_t inside_us) {
  delay_before = before_us;
  delay_inside = inside_us;
}

}  // namespace anabranch::cpu
