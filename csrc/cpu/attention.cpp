#include "cpu/attention.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "cpu/region.hpp"

#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef ANABRANCH_AMX
#include <cpuid.h>
#endif

namespace anabranch::cpu {
namespace {

// Below these, waking threads costs more than they bring.
constexpr int64_t SERIAL_WORK = 1 << 17;   // multiply-adds
constexpr int64_t SERIAL_BYTES = 1 << 17;  // bytes copied
constexpr int SHARES_PER_THREAD = 4;       // at least, for balance

std::atomic<const Kernels*> chosen{nullptr};

// What a thread takes at a time: an item for some of its KV heads, in the plan's order (most expensive first).
struct Share {
  int32_t item, begin, end;
};

// The heads that a thread takes together of an item: `few` of one with few rows, `tree` of one with parts.
std::vector<Share> shares_of(const Attention& a, int few, int tree) {
  std::vector<Share> shares;
  for (int32_t i = 0; i < a.num_items; ++i) {
    const int parts = parts_of(a, i);
    if (parts < 0) continue;
    const int each = parts > 0 ? tree : a.items[8 * int64_t(i) + 3] * a.group > STREAM_ROWS ? 1 : few;
    for (int32_t h = 0; h < a.num_kv_heads; h += each) shares.push_back({i, h, std::min(h + each, a.num_kv_heads)});
  }
  return shares;
}

#ifdef ANABRANCH_AMX
// The processor's word, and Linux's: a process asks once before it may use the registers.
bool may_use_amx() {
  static const bool may = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl's numbers, <asm/prctl.h> since Linux 5.16
    return (d & AMX_BF16) && (d & AMX_TILE) && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  }();
  return may;
}
#endif

}  // namespace

std::vector<Variant> compiled() {
  std::vector<Variant> all;
#ifdef ANABRANCH_X86
  all.push_back({"wide", kernels_wide});  // what only newer processors run: for tests, hence the least preferred
#endif
#if defined(ANABRANCH_X86) && !defined(ANABRANCH_FEW_CPU_VARIANTS)
  all.push_back({"wide_amx", kernels_wide_amx});
#endif
  all.push_back({"plain", kernels_plain});
#if defined(ANABRANCH_X86) && !defined(ANABRANCH_FEW_CPU_VARIANTS)
  all.push_back({"avx2", kernels_avx2});
  all.push_back({"avx512", kernels_avx512});
#ifdef ANABRANCH_AVX512BF16
  all.push_back({"avx512bf16", kernels_avx512bf16});
#ifdef ANABRANCH_AMX
  all.push_back({"amx", kernels_amx});
#endif
#endif
#endif
  return all;
}

bool runnable(const std::string& isa) {
#ifdef ANABRANCH_X86
  __builtin_cpu_init();
#ifdef ANABRANCH_AMX
  if (isa == "amx") return runnable("avx512bf16") && may_use_amx();
#endif
  if (isa == "avx2" || isa == "wide" || isa == "wide_amx") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx512bf16" && !__builtin_cpu_supports("avx512bf16")) return false;
  if (isa == "avx512" || isa == "avx512bf16")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
#endif
  return isa == "plain";
}

void use(const std::string& isa) {
  if (isa.empty()) {
    chosen = nullptr;
    return;
  }
  std::string names;
  for (const Variant& each : compiled()) {
    if (isa == each.isa) {
      if (!runnable(isa)) throw std::invalid_argument("instruction set '" + isa + "' does not run on this machine");
      chosen = &each.kernels();
      return;
    }
    names += std::string(names.empty() ? "" : ", ") + each.isa;
  }
  throw std::invalid_argument("instruction set '" + isa + "' is unknown; this build has: " + names);
}

const Kernels& active() {
  const Kernels* k = chosen.load(std::memory_order_acquire);
  if (k) return *k;
  const char* wish = std::getenv("ANABRANCH_CPU_ISA");
  if (wish && *wish) {
    use(wish);
    return *chosen.load();
  }
  const std::vector<Variant> all = compiled();
  k = &std::find_if(all.rbegin(), all.rend(), [](const Variant& each) { return runnable(each.isa); })->kernels();
  chosen = k;
  return *k;
}

void attention(Attention& a, int threads) {
  const Kernels& kernels = active();
  int rows = 1, subtree_rows = 1, few = 0, trees = 0;
  int64_t work = 0;
  for (int i = 0; i < a.num_items; ++i) {
    const int32_t* item = a.items + 8 * int64_t(i);
    const int packed = item[3] * a.group, parts = parts_of(a, i);
    work += int64_t(item[1]) * item[3] * a.num_q_heads;
    if (parts < 0) continue;
    if (parts > 0) {
      subtree_rows = std::max(subtree_rows, packed);
      ++trees;
      continue;
    }
    rows = std::max(rows, packed);
    few += packed <= STREAM_ROWS;
  }
  if (work * (a.head_dim + a.v_dim) < SERIAL_WORK) threads = 1;
  // Fewer heads together where there would be too few shares for the threads.
  const auto together = [&](int most, int items) {
    int heads = std::min(a.num_kv_heads, most);
    const auto count = [&] { return items * ((a.num_kv_heads + heads - 1) / heads); };
    while (heads > 1 && threads > 1 && count() < SHARES_PER_THREAD * threads) heads = (heads + 1) / 2;
    return heads;
  };
  const int few_heads = together(kernels.stream_heads(a.head_dim, a.v_dim), few);
  const int tree_heads = together(kernels.subtree_heads(subtree_rows, a.head_dim, a.v_dim), trees);
  const std::vector<Share> shares = shares_of(a, few_heads, tree_heads);
  const int64_t partials = a.num_merge ? a.merge_ptr[a.num_merge] : 0, entries = partials * a.num_q_heads;
  const size_t line = 64, head = (size_t(entries) * 4 + line - 1) / line * line;
  size_t scratch_bytes = kernels.scratch_bytes(rows, a.head_dim, a.v_dim, few_heads);
  if (trees > 0)
    scratch_bytes = std::max(scratch_bytes, kernels.subtree_scratch(subtree_rows, a.head_dim, a.v_dim, tree_heads));
  const size_t each = (scratch_bytes + line - 1) / line * line;
  Lease space;
  space->reserve(2 * head + size_t(entries) * a.v_dim * 4 + line + each * size_t(threads));
  a.part_m = reinterpret_cast<float*>(space->data);
  a.part_l = reinterpret_cast<float*>(space->data + head);
  a.part_acc = reinterpret_cast<float*>(space->data + 2 * head);
  char* scratch = space->data + 2 * head + (size_t(entries) * a.v_dim * 4 + line - 1) / line * line;

  for_each(threads, int64_t(shares.size()), 1, [&](int thread, int64_t i, int64_t) {
    const Share& s = shares[size_t(i)];
    kernels.unit(a, s.item, s.begin, s.end, scratch + each * size_t(thread));
  });
  const int64_t merges = int64_t(a.num_merge) * a.num_q_heads;
  if (merges == 0) return;
  if ((merges + entries) * a.v_dim < SERIAL_WORK) threads = 1;
  for_each(threads, merges, threads == 1 ? merges : 16, [&](int, int64_t begin, int64_t end) {
    kernels.merge(a, begin, end);
  });
}

void write(const Write& k, const Write& v, int64_t rows, int threads) {
  const int64_t size = int64_t(size_of(k.type));
  const Kernels& kernels = active();
  if (rows * k.num_kv_heads * (k.head_dim + v.head_dim) * size < SERIAL_BYTES) threads = 1;
  for_each(threads, rows, threads == 1 ? std::max<int64_t>(rows, 1) : 16, [&](int, int64_t begin, int64_t end) {
    for (const Write* w : {&k, &v}) {
      if (!w->src) continue;
      for (int64_t r = begin; r < end; ++r) {
        if (w->slots[r] < 0) continue;  // rows that only fill up a captured graph
        if (w->stored != Stored::as_is) {
          for (int h = 0; h < w->num_kv_heads; ++h) kernels.quantise(*w, r, h);
          continue;
        }
        const int64_t page = w->slots[r] / w->page_size, offset = w->slots[r] % w->page_size;
        const char* from = static_cast<const char*>(w->src) + r * w->src_row * size;
        char* to = static_cast<char*>(const_cast<void*>(w->dst.data)) + (page * w->dst.page + offset * w->dst.slot) * size;
        for (int h = 0; h < w->num_kv_heads; ++h)
          std::memcpy(to + h * w->dst.head * size, from + h * w->src_head * size, size_t(w->head_dim * size));
      }
    }
  });
}

void copy_pages(const Copy& c, int64_t count, int threads) {
  int64_t tokens = 0;
  for (int64_t i = 0; i < count; ++i) tokens += c.filled[i];
  if (tokens * c.planes * c.heads * c.row < SERIAL_BYTES) threads = 1;
  const int64_t jobs = count * c.planes;
  for_each(threads, jobs, threads == 1 ? std::max<int64_t>(jobs, 1) : 4, [&](int, int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t plane = job / count, i = job % count;
      char* base = c.data + plane * c.plane;
      for (int64_t h = 0; h < c.heads; ++h)
        std::memcpy(base + c.dst[i] * c.page + h * c.head, base + c.src[i] * c.page + h * c.head,
                    size_t(c.filled[i] * c.row));
      if (!c.scales) continue;
      float* scales = c.scales + plane * c.scale_plane;
      for (int64_t h = 0; h < c.heads; ++h)
        std::memcpy(scales + c.dst[i] * c.scale_page + h * c.scale_head,
                    scales + c.src[i] * c.scale_page + h * c.scale_head, size_t(c.filled[i]) * sizeof(float));
    }
  });
}

#ifdef __linux__
namespace {

// Tells the system about the whole pages of [data, data + bytes), `most` bytes a call.
bool advise(void* data, int64_t bytes, int advice, uintptr_t most) {
  const uintptr_t small = uintptr_t(sysconf(_SC_PAGESIZE));
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + small - 1) / small * small;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / small * small;
  if (begin >= end) return false;
  for (; begin < end; begin += std::min(most, end - begin))
    if (madvise(reinterpret_cast<void*>(begin), std::min(most, end - begin), advice) != 0) return false;
  return true;
}

constexpr int POPULATE_WRITE = 23;  // MADV_POPULATE_WRITE, of Linux 5.14; older headers do not name it

}  // namespace

bool large_pages(void* data, int64_t bytes) { return advise(data, bytes, MADV_HUGEPAGE, UINTPTR_MAX); }
bool populate(void* data, int64_t bytes) { return advise(data, bytes, POPULATE_WRITE, uintptr_t(64) << 20); }
#else
bool large_pages(void*, int64_t) { return false; }
bool populate(void*, int64_t) { return false; }
#endif

}  // namespace anabranch::cpu
