#include "emulator.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <set>

#include "fiber.hpp"

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
// What a call leaves to the callee is saved on the stack that is left and restored from the one that is entered.
asm(R"(
  .text
  .globl emulator_switch
  .type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emulator_switch, .-emulator_switch
)");
#endif

namespace emulator {
namespace {

constexpr int kLanes = 32, kMaxThreads = 1024, kMaxSites = 64;
constexpr size_t kStack = 96 * 1024;
constexpr int kAllowedUnasked = 48 * 1024;  // bytes of shared memory
constexpr uint64_t kCanary = 0x5ca1ab1e0ddba115ull;

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t x = state += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
};

// One lane's part in an instruction of the warp.
enum class Kind : int { shuffle, any, ldmatrix, ldmatrix_trans, mma_bf16, mma_f16 };
const char* const kKindNames[] = {"shuffle", "any", "ldmatrix", "ldmatrix.trans", "mma bf16", "mma f16"};

struct Frame {
  Kind kind;
  int lane = 0;                   // shuffle: whose value
  const void* address = nullptr;  // ldmatrix
  uint32_t in[6] = {};            // shuffle, any: one; mma: a, b
  float c[4] = {};
  uint32_t out[4] = {};
};

struct Copy {
  char* to;
  const char* from;
  int bytes, width;
  int64_t group;
};

enum class State { ready, warp, barrier, done };

// A warp's asynchronous copy, as its lanes come to it.
struct WarpCopy {
  uintptr_t to[kLanes], from[kLanes];  // from: 0 where nothing is read
  int arrived = 0;
};

struct Thread {
  Fiber fiber;
  int id = 0;
  State state = State::ready;
  int site = 0;
  Frame* frame = nullptr;
  std::vector<Copy> copies;
  int64_t committed = 0, copied = 0;
  bool waited = true;  // for the launch before, beside which this one runs
  bool allowed = false;  // the next launch to begin
  int passed = 0;     // the last site
  int64_t loads = 0;  // of global memory, since then
  char* stack = nullptr;
};

struct Warp {
  int ready[kLanes];
  int num_ready = 0, arrived = 0, size = 0;
  std::map<int64_t, WarpCopy> copies;  // by number, until all lanes have come
};

struct Allocation {
  uintptr_t begin, end;
  bool writable;
  std::string name;
  bool written = false, pending = false;  // by this launch; by the one before, which this one may run beside
};

struct Device {
  Config config;
  Statistics statistics;
  std::map<const void*, int> allowed;  // bytes of shared memory, a kernel
  std::vector<Allocation> allocations;
  size_t last_hit = 0;

  Random random{0};
  std::unique_ptr<char[]> stacks, shared_storage;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Thread* current = nullptr;
  Fiber main;
  int block = 0, num_blocks = 0, num_done = 0, at_barrier = 0, running_warp = 0;
  int64_t in_flight = 0;  // bytes
  bool failed = false;
  bool allows = false, beside = false;  // the launch before: all its threads allowed the next one; this one runs beside it
  int64_t allowing = 0;                 // threads of this launch that did
  std::string failure;
  const std::function<void()>* body = nullptr;
};
Device device;

std::string who(const Thread& t) { return "block " + std::to_string(device.block) + ", thread " + std::to_string(t.id); }
[[noreturn]] void trap(const std::string& what) { throw Trap(who(*device.current) + ": " + what); }

void make_ready(Thread& t) {
  t.state = State::ready;
  Warp& w = device.warps[t.id / kLanes];
  w.ready[w.num_ready++] = t.id;
}

// Passes over the banks: eight lanes of 16 bytes at a time, each of which covers four banks of one of eight groups.
int wavefronts(const uintptr_t (&at)[kLanes]) {
  int all = 0;
  for (int first = 0; first < kLanes; first += 8) {
    std::set<uintptr_t> of_group[8];
    size_t most = 1;
    for (int i = first; i < first + 8; ++i) {
      auto& group = of_group[at[i] / 16 % 8];
      group.insert(at[i]);
      most = std::max(most, group.size());
    }
    all += static_cast<int>(most);
  }
  return all;
}

void count_copy(Thread& t, const void* to, const void* from, int bytes) {
  Warp& w = device.warps[t.id / kLanes];
  const int64_t number = t.copied++;
  WarpCopy& copy = w.copies[number];
  copy.to[t.id % kLanes] = reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(device.shared);
  copy.from[t.id % kLanes] = bytes > 0 ? reinterpret_cast<uintptr_t>(from) : 0;
  if (++copy.arrived < kLanes) return;
  std::set<uintptr_t> sectors;
  for (uintptr_t address : copy.from)
    if (address != 0) sectors.insert(address / 32);
  Statistics& s = device.statistics;
  ++s.copy_instructions;
  s.copy_wavefronts += wavefronts(copy.to);
  s.copy_sectors += static_cast<int64_t>(sectors.size());
  w.copies.erase(number);
}

void land(const Copy& c) {
  device.in_flight -= c.bytes;
  if (c.bytes > 0) memcpy(c.to, c.from, c.bytes);
  memset(c.to + c.bytes, 0, c.width - c.bytes);
}

// Some copy of some thread arrives, in no order at all.
void land_one() {
  Thread& t = device.threads[device.random.below(static_cast<uint32_t>(device.threads.size()))];
  if (t.copies.empty()) return;
  const size_t i = device.random.below(static_cast<uint32_t>(t.copies.size()));
  land(t.copies[i]);
  t.copies[i] = t.copies.back();
  t.copies.pop_back();
}

// The next thread to run, taken from the ready ones; null when there is none.
Thread* pick() {
  const int n = static_cast<int>(device.warps.size());
  int warp = -1;
  if (device.config.schedule == Schedule::sticky) {
    if (device.random.below(512) != 0 && device.warps[device.running_warp].num_ready > 0) warp = device.running_warp;
    if (warp < 0) {
      const int start = static_cast<int>(device.random.below(n));
      for (int i = 0; i < n && warp < 0; ++i)
        if (device.warps[(start + i) % n].num_ready > 0) warp = (start + i) % n;
    }
  } else {
    int total = 0;
    for (const Warp& w : device.warps) total += w.num_ready;
    if (total > 0) {
      int r = static_cast<int>(device.random.below(total));
      for (warp = 0; r >= device.warps[warp].num_ready; ++warp) r -= device.warps[warp].num_ready;
    }
  }
  if (warp < 0) return nullptr;
  device.running_warp = warp;
  Warp& w = device.warps[warp];
  const int i = static_cast<int>(device.random.below(w.num_ready));
  Thread* t = &device.threads[w.ready[i]];
  w.ready[i] = w.ready[--w.num_ready];
  return t;
}

// Leaves the current thread, which is no longer ready (or has been put among the ready ones).
void reschedule() {
  if (device.config.landing == Landing::random && device.random.below(4) == 0) land_one();
  Thread* self = device.current;
  Thread* next = pick();
  if (next == self) return;
  ++device.statistics.switches;
  device.current = next;
  Fiber::change(self->fiber, next != nullptr ? next->fiber : device.main);
}

void fiber_entry() {
  Thread& self = *device.current;
  try {
    (*device.body)();
    if (!self.copies.empty()) trap("ends with asynchronous copies that it never waited for");
    if (!self.waited) trap("ends without having waited for the launch before");
    device.allowing += self.allowed;
  } catch (const std::exception& e) {
    if (!device.failed) device.failure = e.what();
    device.failed = true;
  }
  self.state = State::done;
  ++device.num_done;
  if (device.failed) {
    device.current = nullptr;
    Fiber::change(self.fiber, device.main);
  }
  reschedule();
  std::abort();  // never scheduled again
}

std::string deadlock() {
  std::string text = "block " + std::to_string(device.block) + ": threads wait for each other:";
  int told = 0;
  for (const Thread& t : device.threads) {
    if (told == 6) return text + " …";
    const Thread* before = t.id > 0 ? &device.threads[t.id - 1] : nullptr;
    if (before != nullptr && before->state == t.state && before->site == t.site) continue;
    ++told;
    text += " thread " + std::to_string(t.id);
    if (t.state == State::done) text += " has ended;";
    if (t.state == State::barrier) text += " at barrier " + std::to_string(t.site) + ";";
    if (t.state == State::warp) text += std::string(" in ") + kKindNames[int(t.frame->kind)] + ";";
  }
  return text;
}

void run_block() {
  Device& d = device;
  memset(d.shared, 0xff, d.shared_bytes);  // NaN in all float types
  for (Warp& w : d.warps) w = Warp{};
  d.num_done = d.at_barrier = 0;
  d.in_flight = 0;
  d.failed = false;
  for (Thread& t : d.threads) {
    t.copies.clear();
    t.committed = t.copied = 0;
    t.passed = 0;
    t.waited = !d.beside;
    t.allowed = false;
    t.loads = 0;
    t.frame = nullptr;
    ++d.warps[t.id / kLanes].size;
    memcpy(t.stack, &kCanary, sizeof kCanary);
    t.fiber.prepare(t.stack, kStack, fiber_entry);
    make_ready(t);
  }
  d.running_warp = static_cast<int>(d.random.below(static_cast<uint32_t>(d.warps.size())));
  d.current = pick();
  Fiber::change(d.main, d.current->fiber);
  for (const Thread& t : d.threads)
    if (memcmp(t.stack, &kCanary, sizeof kCanary) != 0) throw Trap("a fiber's stack overflowed; enlarge kStack");
  if (d.failed) throw Trap(d.failure);
  if (d.num_done != static_cast<int>(d.threads.size())) throw Trap(deadlock());
  ++d.statistics.blocks;
}

float bits_to_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
uint32_t float_to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

float half_to_float(uint16_t h) {
  static const std::vector<float> table = [] {
    std::vector<float> t(1 << 16);
    for (uint32_t i = 0; i < t.size(); ++i) {
      const uint32_t exponent = i >> 10 & 31, mantissa = i & 1023;
      const float magnitude = exponent == 31   ? (mantissa ? NAN : INFINITY)
                              : exponent == 0  ? std::ldexp(static_cast<float>(mantissa), -24)
                                               : std::ldexp(static_cast<float>(mantissa + 1024), int(exponent) - 25);
      t[i] = i >> 15 ? -magnitude : magnitude;
    }
    return t;
  }();
  return table[h];
}

float element(uint16_t bits, bool bfloat) { return bfloat ? bits_to_float(uint32_t(bits) << 16) : half_to_float(bits); }

void execute(Frame* const (&f)[kLanes]) {
  switch (f[0]->kind) {
    case Kind::shuffle:
      for (int i = 0; i < kLanes; ++i) f[i]->out[0] = f[f[i]->lane]->in[0];
      return;
    case Kind::any: {
      uint32_t some = 0;
      for (int i = 0; i < kLanes; ++i) some |= f[i]->in[0];
      for (int i = 0; i < kLanes; ++i) f[i]->out[0] = some;
      return;
    }
    case Kind::ldmatrix:
    case Kind::ldmatrix_trans: {
      uintptr_t rows[kLanes];
      for (int i = 0; i < kLanes; ++i)
        rows[i] = reinterpret_cast<uintptr_t>(f[i]->address) - reinterpret_cast<uintptr_t>(device.shared);
      ++device.statistics.ldmatrix;
      device.statistics.ldmatrix_wavefronts += wavefronts(rows);
      for (int i = 0; i < kLanes; ++i)
        for (int matrix = 0; matrix < 4; ++matrix) {
          uint16_t pair[2];
          for (int e = 0; e < 2; ++e) {
            int row = i / 4, column = 2 * (i % 4) + e;
            if (f[0]->kind == Kind::ldmatrix_trans) std::swap(row, column);
            pair[e] = static_cast<const uint16_t*>(f[8 * matrix + row]->address)[column];
          }
          memcpy(&f[i]->out[matrix], pair, 4);
        }
      return;
    }
    case Kind::mma_bf16:
    case Kind::mma_f16: {
      ++device.statistics.mma;
      const bool bfloat = f[0]->kind == Kind::mma_bf16;
      float a[16][16], b[16][8], c[16][8];
      for (int i = 0; i < kLanes; ++i) {
        const int g = i / 4, t = i % 4;
        for (int half = 0; half < 2; ++half) {
          const auto at = [&](int r) { return element(static_cast<uint16_t>(f[i]->in[r] >> (16 * half)), bfloat); };
          a[g][2 * t + half] = at(0);
          a[g + 8][2 * t + half] = at(1);
          a[g][2 * t + 8 + half] = at(2);
          a[g + 8][2 * t + 8 + half] = at(3);
          b[2 * t + half][g] = at(4);
          b[2 * t + 8 + half][g] = at(5);
          c[g][2 * t + half] = f[i]->c[half];
          c[g + 8][2 * t + half] = f[i]->c[2 + half];
        }
      }
      for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
          for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
      for (int i = 0; i < kLanes; ++i)
        for (int half = 0; half < 2; ++half) {
          f[i]->c[half] = c[i / 4][2 * (i % 4) + half];
          f[i]->c[2 + half] = c[i / 4 + 8][2 * (i % 4) + half];
        }
      return;
    }
  }
}

// All lanes of the warp bring their frames; the last one to come carries out the instruction for all.
void meet(Frame& frame) {
  Thread& self = *device.current;
  Warp& w = device.warps[self.id / kLanes];
  if (w.size != kLanes) trap("a warp's instruction in a warp of fewer than 32 threads");
  self.frame = &frame;
  if (++w.arrived < kLanes) {
    self.state = State::warp;
    reschedule();
    return;
  }
  w.arrived = 0;
  const int first = self.id / kLanes * kLanes;
  Frame* frames[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    frames[i] = device.threads[first + i].frame;
    if (frames[i]->kind != frame.kind)
      trap(std::string("is in ") + kKindNames[int(frame.kind)] + " while thread " + std::to_string(first + i) +
           " of its warp is in " + kKindNames[int(frames[i]->kind)]);
  }
  execute(frames);
  for (int i = 0; i < kLanes; ++i) make_ready(device.threads[first + i]);
  reschedule();
}

void count(int site) {
  if (site <= 0 || site >= kMaxSites) return;
  if (device.statistics.sites.empty()) device.statistics.sites.assign(kMaxSites, 0);
  ++device.statistics.sites[site];
  Thread& self = *device.current;
  auto& most = device.statistics.loads;
  if (most.empty()) most.assign(kMaxSites, 0);
  most[self.passed] = std::max(most[self.passed], self.loads);
  self.passed = site;
  self.loads = 0;
}

}  // namespace

void configure(const Config& config) { device.config = config; }
const Statistics& statistics() { return device.statistics; }
void reset_statistics() { device.statistics = Statistics{}; }

void register_memory(const void* begin, size_t bytes, bool writable, const std::string& name) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
  auto& all = device.allocations;
  all.insert(std::upper_bound(all.begin(), all.end(), at, [](uintptr_t x, const Allocation& a) { return x < a.begin; }),
             Allocation{at, at + bytes, writable, name, false, false});
  device.last_hit = 0;
}
void forget_memory() {
  device.allocations.clear();
  device.last_hit = 0;
}

void allow_shared(const void* function, int bytes) {
  int& allowed = device.allowed.try_emplace(function, kAllowedUnasked).first->second;
  if (bytes < allowed)
    throw Trap("allow_shared: " + std::to_string(bytes) + " bytes, where the kernel was allowed " +
               std::to_string(allowed) + ": another thread of the host may be about to launch it with as much");
  allowed = bytes;
}

void launch(const void* function, int grid, int threads, size_t shared_bytes, const std::function<void()>& body,
            bool beside) {
  Device& d = device;
  const auto known = d.allowed.find(function);
  const int allowed = known == d.allowed.end() ? kAllowedUnasked : known->second;
  if (shared_bytes > size_t(allowed))
    throw Trap("launch: " + std::to_string(shared_bytes) + " bytes of shared memory, where the kernel is allowed " +
               std::to_string(allowed));
  if (grid < 1 || threads < 1 || threads > kMaxThreads)
    throw Trap("launch: a grid of " + std::to_string(grid) + " blocks of " + std::to_string(threads) + " threads");
  if (!d.stacks) d.stacks.reset(new char[kMaxThreads * kStack + 64]);
  char* stacks = d.stacks.get() + (64 - reinterpret_cast<uintptr_t>(d.stacks.get()) % 64) % 64;
  d.threads.assign(threads, Thread{});
  for (int i = 0; i < threads; ++i) {
    d.threads[i].id = i;
    d.threads[i].stack = stacks + i * kStack;
  }
  d.warps.assign((threads + kLanes - 1) / kLanes, Warp{});
  d.shared_storage.reset(new char[shared_bytes + 128]);
  d.shared = d.shared_storage.get() + (128 - reinterpret_cast<uintptr_t>(d.shared_storage.get()) % 128) % 128;
  d.shared_bytes = shared_bytes;
  d.body = &body;
  d.random.state = d.config.seed * 0x9e3779b97f4a7c15ull + 1;
  d.num_blocks = grid;
  ++d.statistics.launches;
  d.beside = beside && d.allows;
  d.statistics.beside += d.beside;
  d.allows = false;
  d.allowing = 0;
  for (Allocation& a : d.allocations) {
    a.pending = d.beside && a.written;
    a.written = false;
  }
  std::vector<int> order(grid);
  for (int i = 0; i < grid; ++i) order[i] = i;
  for (int i = grid - 1; i > 0; --i) std::swap(order[i], order[d.random.below(static_cast<uint32_t>(i + 1))]);
  for (int b : order) {
    d.block = b;
    run_block();
  }
  d.allows = d.allowing == static_cast<int64_t>(grid) * threads;
}

int thread() { return device.current->id; }
int block() { return device.block; }
int blocks() { return device.num_blocks; }
char* shared_memory() { return device.shared; }

void check(const void* p, size_t bytes, size_t alignment, bool write) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p), shared = reinterpret_cast<uintptr_t>(device.shared);
  const auto inside = [&](uintptr_t begin, uintptr_t end) { return at >= begin && at + bytes <= end; };
  const auto describe = [&] {
    char address[24];
    std::snprintf(address, sizeof address, "0x%llx", static_cast<unsigned long long>(at));
    return std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes at " + address;
  };
  if (at % alignment != 0) trap(describe() + " is not aligned to " + std::to_string(alignment));
  if (inside(shared, shared + device.shared_bytes)) return;
  const auto& all = device.allocations;
  if (all.empty()) return;
  const Allocation* a = &all[device.last_hit];
  if (!inside(a->begin, a->end)) {
    auto after = std::upper_bound(all.begin(), all.end(), at, [](uintptr_t x, const Allocation& b) { return x < b.begin; });
    if (after == all.begin() || !inside((after - 1)->begin, (after - 1)->end)) {
      std::string where = "outside every allocation";
      if (after != all.begin())
        where += ", " + std::to_string(at - (after - 1)->begin) + " bytes after the begin of " + (after - 1)->name + " (" +
                 std::to_string((after - 1)->end - (after - 1)->begin) + " bytes)";
      trap(describe() + " is " + where);
    }
    device.last_hit = static_cast<size_t>(after - 1 - all.begin());
    a = &all[device.last_hit];
  }
  if (write && !a->writable) trap(describe() + " changes " + a->name + ", which is read only");
  if (!device.current->waited && (write || a->pending))
    trap(describe() + " touches " + a->name + " before the launch before was waited for");
  device.allocations[device.last_hit].written |= write;
}

void count_load(const void* p) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p), shared = reinterpret_cast<uintptr_t>(device.shared);
  device.current->loads += at < shared || at >= shared + device.shared_bytes;
}

void sync_block(int site) {
  count(site);
  if (site != 0 && site == device.config.planted) return;
  Thread& self = *device.current;
  self.site = site;
  if (++device.at_barrier < static_cast<int>(device.threads.size())) {
    self.state = State::barrier;
    reschedule();
    return;
  }
  device.at_barrier = 0;
  for (Thread& t : device.threads) {
    if (&t != &self && t.state != State::barrier) trap("a barrier counted a thread that is not there");
    if (t.site != site)
      trap("is at barrier " + std::to_string(site) + " while thread " + std::to_string(t.id) + " is at barrier " +
           std::to_string(t.site));
    make_ready(t);
  }
  reschedule();
}

float shuffle(float value, int lane) {
  Frame f{Kind::shuffle};
  f.lane = lane;
  f.in[0] = float_to_bits(value);
  meet(f);
  return bits_to_float(f.out[0]);
}
int shuffle(int value, int lane) {
  Frame f{Kind::shuffle};
  f.lane = lane;
  f.in[0] = static_cast<uint32_t>(value);
  meet(f);
  return static_cast<int>(f.out[0]);
}
bool any(bool value) {
  Frame f{Kind::any};
  f.in[0] = value;
  meet(f);
  return f.out[0] != 0;
}

void ldmatrix_x4(uint32_t (&d)[4], const void* row, bool transposed) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(row), shared = reinterpret_cast<uintptr_t>(device.shared);
  if (at < shared || at + 16 > shared + device.shared_bytes) trap("ldmatrix of a row outside shared memory");
  check(row, 16, 16, false);
  Frame f{transposed ? Kind::ldmatrix_trans : Kind::ldmatrix};
  f.address = row;
  meet(f);
  memcpy(d, f.out, sizeof d);
}

void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat) {
  Frame f{bfloat ? Kind::mma_bf16 : Kind::mma_f16};
  memcpy(f.in, a, sizeof a);
  f.in[4] = b0;
  f.in[5] = b1;
  memcpy(f.c, c, sizeof c);
  meet(f);
  memcpy(c, f.c, sizeof c);
}

void copy_async(void* to, const void* from, int bytes, int width) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(to), shared = reinterpret_cast<uintptr_t>(device.shared);
  if (at < shared || at + width > shared + device.shared_bytes) trap("an asynchronous copy to outside shared memory");
  if (bytes < 0 || bytes > width) trap("an asynchronous copy of " + std::to_string(bytes) + " bytes");
  check(to, width, width, true);
  if (bytes > 0) check(from, static_cast<size_t>(bytes), width, false);
  Thread& self = *device.current;
  if (width == 16) {  // tiles and queries; small ones are numbers, of some lanes alone
    ++device.statistics.copies;
    count_copy(self, to, from, bytes);
  }
  device.in_flight += bytes;
  device.statistics.most_in_flight = std::max(device.statistics.most_in_flight, device.in_flight);
  const Copy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes, width, self.committed};
  if (device.config.landing == Landing::at_once) {
    land(copy);
  } else {
    memset(to, 0xff, width);
    self.copies.push_back(copy);
  }
}

void fetch_to_cache(const void* global, int bytes) {
  if (bytes <= 0 || bytes % 16 != 0) trap("a fetch of " + std::to_string(bytes) + " bytes to the cache");
  check(global, static_cast<size_t>(bytes), 16, false);
  device.statistics.cached += bytes;
}

void copy_commit() { ++device.current->committed; }

void copy_wait(int pending, int site) {
  count(site);
  if (site != 0 && site == device.config.planted) return;
  Thread& self = *device.current;
  auto& copies = self.copies;
  size_t kept = 0;
  for (size_t i = 0; i < copies.size(); ++i) {
    if (copies[i].group < self.committed - pending)
      land(copies[i]);
    else
      copies[kept++] = copies[i];
  }
  copies.resize(kept);
}

void allow_next_launch() { device.current->allowed = true; }
void wait_for_launch_before(int site) {
  count(site);
  if (site == 0 || site != device.config.planted) device.current->waited = true;
}

uint32_t pack_bf16(float low, float high) {
  const auto round = [](float x) -> uint32_t {
    const uint32_t bits = float_to_bits(x);
    if (std::isnan(x)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}

uint32_t pack_f16(float low, float high) {
  const auto round = [](float x) -> uint32_t {
    if (std::isnan(x)) return 0x7fff;
    const uint32_t sign = float_to_bits(x) >> 16 & 0x8000;
    const float magnitude = std::fabs(x);
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    if (magnitude == 0) return sign;
    int exponent;
    std::frexp(magnitude, &exponent);
    exponent = std::max(exponent - 1, -14);
    const long steps = std::lrint(std::ldexp(magnitude, 10 - exponent));  // to nearest even; may reach the next exponent
    return sign | static_cast<uint32_t>(steps + (exponent + 14) * 1024);
  };
  return round(low) | round(high) << 16;
}

float widen(uint16_t bits, bool bfloat) { return element(bits, bfloat); }
uint32_t plus_zero_times(uint32_t sum, uint32_t x, uint32_t exponent) {
  for (int half = 0; half < 32; half += 16)
    if ((x >> half & exponent) == exponent) sum |= 0x7fffu << half;
  return sum;
}

float exp2(float x) { return std::exp2(x); }
float log2(float x) { return std::log2(x); }

}  // namespace emulator
