// anabranch._core: the tree of spans and the planner for Python. Metadata in, numpy arrays out; no tensor, no device.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <list>
#include <memory>

#include "plan/branch_plan.hpp"
#include "plan/plan.hpp"
#include "plan/table_plans.hpp"
#include "tree/tree.hpp"

namespace py = pybind11;
using namespace anabranch;

namespace {

// The handle users hold. It never keeps KV alive by itself: `release` does, or the cache going away.
struct Branch {
  std::shared_ptr<Tree> tree;
  i32 id;
  i64 serial;

  bool alive() const {
    const BranchState& b = tree->peek(id);
    return b.alive && b.serial == serial;
  }
  const BranchState& state(const char* what = nullptr) const {
    if (!alive())
      throw DeadBranch((what ? std::string(what) + ": " : std::string()) + "branch " + std::to_string(serial) +
                       " was released or joined; fork another or start one with cache.branch()");
    return tree->peek(id);
  }
};

template <class T>
py::array_t<T> array_of(std::vector<T> values) {  // hands the memory over, no copy
  auto* kept = new std::vector<T>(std::move(values));
  py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>({static_cast<py::ssize_t>(kept->size())}, {sizeof(T)}, kept->data(), owner);
}

struct Step {
  std::shared_ptr<Tree> tree;
  StepState state;

  // Index of the first branch whose context has changed since, or −1.
  i64 moved_on() const {
    for (size_t i = 0; i < state.branches.size(); ++i) {
      const BranchState& b = tree->peek(state.branches[i]);
      if (!b.alive || b.version != state.versions[i]) return static_cast<i64>(i);
    }
    for (size_t i = 0; i < state.read_branches.size(); ++i) {
      const BranchState& b = tree->peek(state.read_branches[i]);
      if (!b.alive || b.version != state.read_versions[i]) return static_cast<i64>(state.branches.size() + i);
    }
    return -1;
  }
};

// One state of a plan: the numbers behind its sections, and which build they belong to. A kept plan is advanced in place,
// so the buffer of an earlier result shows the later state.
struct PlanResult {
  PlanData data;
  i64 build, advances;

  py::array_t<i32> kv() const { return view(data.kv, data.begin[kItems]); }
  py::array_t<i32> work() const { return view(data.work, data.begin[kSections] - data.begin[kItems]); }
  static py::array_t<i32> view(const std::shared_ptr<i32[]>& buffer, i64 size) {
    auto* kept = new std::shared_ptr<i32[]>(buffer);
    py::capsule owner(kept, [](void* p) { delete static_cast<std::shared_ptr<i32[]>*>(p); });
    return py::array_t<i32>({static_cast<py::ssize_t>(size)}, {sizeof(i32)}, buffer.get(), owner);
  }
  std::vector<i64> begin() const { return {data.begin, data.begin + kSections + 1}; }
};

class Cache {
 public:
  Cache(i32 num_pages, i32 page_size) : tree_(std::make_shared<Tree>(num_pages, page_size)) {}

  const Branch& mine(const Branch& b, const char* what) const {
    if (b.tree != tree_)
      throw py::value_error(std::string(what) + ": the branch belongs to another cache; use the one that made it");
    b.state(what);
    return b;
  }
  Branch handle(i32 id) const { return {tree_, id, tree_->peek(id).serial}; }

  Branch branch() { return handle(tree_->new_branch()); }

  std::vector<Branch> fork(const Branch& parent, i64 n) {
    mine(parent, "fork");
    if (n < 1 || n > (1 << 20)) throw py::value_error("fork: n must be from 1 to 2^20, got " + std::to_string(n));
    std::vector<Branch> out;
    out.reserve(n);
    for (i32 id : tree_->fork(parent.id, static_cast<i32>(n))) out.push_back(handle(id));
    return out;
  }

  // What the rows of a step read: {Branch: (ptr [rows + 1], branches, starts, stops, offsets)} → by row; a stop of −1 is
  // all that the branch has with this step. `counts`: new rows of each branch.
  void add_views(StepState& out, const std::vector<i32>& ids, const std::vector<i32>& counts, const py::dict& rows,
                 const py::dict& views) const {
    size_t used = 0, i = 0;
    out.read_ptr.push_back(0);
    for (const auto& [key, value] : rows) {
      if (views.contains(key)) {
        const py::tuple view = views[key];
        const auto ptr = view[0].cast<std::vector<i64>>();
        const auto starts = view[2].cast<std::vector<i64>>(), stops = view[3].cast<std::vector<i64>>(),
                   offsets = view[4].cast<std::vector<i64>>();
        std::vector<Read> reads;
        for (const py::handle item : view[1].cast<py::sequence>()) {
          const Branch& b = mine(item.cast<const Branch&>(), "views");
          const size_t at = reads.size();
          i64 length = b.state().length;
          for (size_t j = 0; j < ids.size(); ++j)
            if (ids[j] == b.id) length += counts[j];
          const i64 stop = stops[at] < 0 ? length : stops[at];
          if (stop > length || starts[at] > stop)
            throw py::value_error("views: tokens " + std::to_string(starts[at]) + " to " + std::to_string(stop) +
                                  " of branch " + std::to_string(b.serial) +
                                  " are to be read, but with this step it has " + std::to_string(length));
          reads.push_back({b.id, starts[at], stop, offsets[at]});
        }
        for (i32 j = 0; j < counts[i]; ++j) {
          out.reads.insert(out.reads.end(), reads.begin() + ptr[j], reads.begin() + ptr[j + 1]);
          out.read_ptr.push_back(static_cast<i32>(out.reads.size()));
        }
        ++used;
      } else {
        for (i32 j = 0; j < counts[i]; ++j) out.read_ptr.push_back(static_cast<i32>(out.reads.size()));
      }
      ++i;
    }
    if (used != views.size()) throw py::value_error("views: names a branch that has no rows in this step");
    for (const Read& read : out.reads)
      if (std::find(out.read_branches.begin(), out.read_branches.end(), read.branch) == out.read_branches.end())
        out.read_branches.push_back(read.branch);
    if (out.reads.empty()) out.read_ptr.clear();
  }

  // rows: {Branch: count}; positions: {Branch: int64 array}, views: see add_views; checked for type by the caller.
  Step step(const py::dict& rows, const py::dict& positions, const py::dict& views) {
    std::vector<i32> ids, counts;
    ids.reserve(rows.size());
    counts.reserve(rows.size());
    for (const auto& [key, value] : rows) {
      // Each loaded once, by a caster of its own: this is done for every branch of every step.
      py::detail::make_caster<Branch> branch;
      py::detail::make_caster<i64> number;
      if (!branch.load(key, false))
        throw py::type_error("step: the keys of rows must be branches, got " + py::repr(key).cast<std::string>());
      if (!number.load(value, true))
        throw py::type_error("step: the number of rows must be an integer, got " + py::repr(value).cast<std::string>());
      const Branch& b = mine(py::detail::cast_op<const Branch&>(branch), "step");
      const i64 count = py::detail::cast_op<i64>(number);
      if (count < 1 || count > (1 << 30))
        throw py::value_error("step: rows for branch " + std::to_string(b.serial) + " must be at least 1, got " +
                              std::to_string(count) + "; leave the branch out of this step instead");
      ids.push_back(b.id);
      counts.push_back(static_cast<i32>(count));
    }
    if (ids.empty()) throw py::value_error("step: no rows; give at least one branch, as in cache.step({branch: 1})");
    std::vector<std::vector<i64>> where(ids.size());
    if (positions.size() > 0) {
      size_t used = 0, i = 0;
      for (const auto& [key, value] : rows) {
        if (positions.contains(key)) {
          const auto given = py::array_t<i64, py::array::c_style>::ensure(positions[key]);
          if (!given || given.ndim() != 1 || given.size() != counts[i])
            throw py::value_error("positions: expected shape [" + std::to_string(counts[i]) + "] for branch " +
                                  std::to_string(key.cast<const Branch&>().serial) + ", got " +
                                  std::to_string(given ? given.size() : 0) + " values");
          where[i].assign(given.data(), given.data() + given.size());
          for (i64 x : where[i])
            if (x < 0) throw py::value_error("positions: must not be negative, got " + std::to_string(x));
          ++used;
        }
        ++i;
      }
      if (used != positions.size())
        throw py::value_error("positions: names a branch that has no rows in this step");
    }
    StepState seen;  // before anything changes
    if (views.size() > 0) add_views(seen, ids, counts, rows, views);
    Step out{tree_, tree_->step(ids, counts, where)};
    out.state.read_ptr = std::move(seen.read_ptr);
    out.state.reads = std::move(seen.reads);
    for (i32 b : seen.read_branches) out.state.read_versions.push_back(tree_->peek(b).version);
    out.state.read_branches = std::move(seen.read_branches);
    return out;
  }

  // Ids of kids that may be joined into, or discarded by, the trunk they were forked from.
  std::vector<i32> kids_of(const Branch& trunk, const std::vector<Branch>& kids) const {
    mine(trunk, "join: trunk");
    std::vector<i32> ids;
    for (size_t i = 0; i < kids.size(); ++i) {
      const std::string what = "join: kids[" + std::to_string(i) + "]";
      mine(kids[i], what.c_str());
      if (tree_->peek(kids[i].id).parent_serial != trunk.serial)
        throw py::value_error(what + " (branch " + std::to_string(kids[i].serial) + ") was not forked from the trunk " +
                              "(branch " + std::to_string(trunk.serial) + "); join it into its own parent first");
      for (i32 id : ids)
        if (id == kids[i].id) throw py::value_error(what + " is given twice");
      ids.push_back(kids[i].id);
    }
    return ids;
  }

  void join(const Branch& trunk, const std::vector<Branch>& kids) { tree_->join(trunk.id, kids_of(trunk, kids)); }

  void share(const Branch& b, const Branch& sibling, i64 count) {
    const BranchState& mine_now = mine(b, "share: branch").state();
    const BranchState& other = mine(sibling, "share: sibling").state();
    if (b.serial == sibling.serial || mine_now.parent_serial < 0 || mine_now.parent_serial != other.parent_serial)
      throw py::value_error("share: branch " + std::to_string(b.serial) + " and sibling (branch " +
                            std::to_string(sibling.serial) + ") were not forked from one branch");
    if (mine_now.length != mine_now.fork_length)
      throw py::value_error("share: branch " + std::to_string(b.serial) + " has " +
                            std::to_string(mine_now.length - mine_now.fork_length) +
                            " tokens of its own; share before its first step");
    const i64 own = other.length - other.fork_length;
    if (count < 0 || count > own)
      throw py::value_error("share: count must be from 0 to " + std::to_string(own) + " (the sibling's own tokens), got " +
                            std::to_string(count));
    i64 seen = 0;
    for (i32 id : other.spans) {
      const bool wanted = seen >= other.fork_length && seen < other.fork_length + count;
      if (wanted && std::find(mine_now.spans.begin(), mine_now.spans.end(), id) != mine_now.spans.end())
        throw py::value_error("share: branch " + std::to_string(b.serial) + " sees tokens of branch " +
                              std::to_string(sibling.serial) + " already");
      seen += tree_->span(id).length();
    }
    tree_->share(b.id, sibling.id, count);
  }

  void discard(const Branch& trunk, const std::vector<Branch>& kids) {
    for (i32 id : kids_of(trunk, kids)) tree_->release(id);
  }

  void truncate(const Branch& b, i64 length) {
    const i64 now = mine(b, "truncate").state().length;
    if (length < 0 || length > now)
      throw py::value_error("truncate: length must be from 0 to " + std::to_string(now) + " (the branch's length), got " +
                            std::to_string(length));
    tree_->truncate(b.id, length);
  }

  void keep(const Branch& b) {
    mine(b, "keep");
    tree_->keep(b.id);
  }

  void release(const Branch& b) {
    mine(b, "release");
    tree_->release(b.id);
  }

  PlanResult plan(const Step& step, const PlanParams& params) {
    LivePlan* slot = nullptr;
    for (LivePlan& live : live_)
      if (live.params() == params) slot = &live;
    if (slot != nullptr && slot->advance(step.state, params)) return {slot->data(), slot->build, slot->advances};
    if (slot == nullptr) {  // a few are kept, one a (backend, head shape)
      if (live_.size() == kKept) live_.pop_front();
      slot = &live_.emplace_back();
    }
    slot->rebuild(*tree_, step.state, params);
    slot->build = ++builds_;  // never used before: callers know by it which arrays they already hold
    return {slot->data(), slot->build, slot->advances};
  }

  py::tuple stats() const {
    i64 advances = 0;
    for (const LivePlan& live : live_) advances += live.advances;
    return py::make_tuple(builds_, advances);
  }

  const std::shared_ptr<Tree>& tree() const { return tree_; }

 private:
  static constexpr size_t kKept = 4;
  std::shared_ptr<Tree> tree_;
  std::list<LivePlan> live_;
  i64 builds_ = 0;
};

// (ptr [B + 1], slots, positions) of contexts, flat: what the dense reference reads.
py::tuple flat(const Contexts& c) {
  std::vector<i64> ptr{0};
  std::vector<i32> slots, positions;
  for (size_t b = 0; b + 1 < c.piece_ptr.size(); ++b) {
    for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) {
      const Contexts::Piece& p = c.pieces[c.piece_ids[i]];
      const size_t at = slots.size();
      slots.resize(at + static_cast<size_t>(p.length));
      positions.resize(slots.size());
      spell(p, c.page_size, slots.data() + at, positions.data() + at);
    }
    ptr.push_back(static_cast<i64>(slots.size()));
  }
  return py::make_tuple(array_of(std::move(ptr)), array_of(std::move(slots)), array_of(std::move(positions)),
                        array_of(std::vector<i32>(c.row_ptr)), array_of(std::vector<i64>(c.row_positions)));
}

// Plans over a user's own block tables.
class BlockTables {
 public:
  BlockTables(const py::array_t<i32, py::array::c_style>& tables, const py::array_t<i64, py::array::c_style>& lengths,
              const py::array_t<i64, py::array::c_style>& queries, i32 page_size)
      : plans_(packed(tables, lengths, queries, page_size)) {}

  // Made of those of an earlier step, if these are the same sequences grown longer.
  bool follow(const BlockTables& before) {
    if (!before.plans_.grow_into(plans_.tables())) return false;
    plans_.follow(before.plans_);
    return true;
  }
  PlanResult plan(const PlanParams& params) { return {plans_.plan(params), 0, 0}; }
  py::object appended(const PlanParams& params) const {
    const auto* changes = plans_.appended(params);
    if (changes == nullptr) return py::none();
    py::array_t<i32> out({static_cast<py::ssize_t>(changes->size()), static_cast<py::ssize_t>(3)});
    static_assert(sizeof(TablePlans::Appended) == 3 * sizeof(i32));
    std::copy_n(reinterpret_cast<const i32*>(changes->data()), changes->size() * 3, out.mutable_data());
    return out;
  }
  py::tuple contexts() { return flat(plans_.contexts()); }
  i32 max_page() const { return plans_.tables().max_page; }
  i64 unique_tokens() {
    i64 tokens = 0;
    for (const Contexts::Piece& piece : plans_.contexts().pieces) tokens += piece.length;
    return tokens;
  }

 private:
  static Tables packed(const py::array_t<i32, py::array::c_style>& tables,
                       const py::array_t<i64, py::array::c_style>& lengths,
                       const py::array_t<i64, py::array::c_style>& queries, i32 page_size) {
    Tables t;
    t.page_size = page_size;
    t.lengths.assign(lengths.data(), lengths.data() + lengths.size());
    t.queries.assign(queries.data(), queries.data() + queries.size());
    t.begin.push_back(0);
    for (const i64 length : t.lengths) t.begin.push_back(t.begin.back() + (length + page_size - 1) / page_size);
    t.pages.resize(static_cast<size_t>(t.begin.back()));
    for (i64 b = 0; b < t.batch(); ++b)
      std::copy_n(tables.data() + b * tables.shape(1), t.begin[b + 1] - t.begin[b], t.pages.data() + t.begin[b]);
    for (const i32 page : t.pages) t.max_page = std::max(t.max_page, page);
    return t;
  }

  TablePlans plans_;
};

// The objects that dictionaries held when this was made. Compared in every step of a compiled model, where a look at
// thousands of attributes from Python takes longer than a layer.
class HeldValues {
 public:
  explicit HeldValues(std::vector<py::dict> dicts) : dicts_(std::move(dicts)) {
    for (const py::dict& d : dicts_) {
      for (const auto& [key, value] : d) values_.push_back(py::reinterpret_borrow<py::object>(value));
      ends_.push_back(values_.size());
    }
  }
  bool same() const {
    size_t at = 0;
    for (size_t i = 0; i < dicts_.size(); ++i) {
      if (static_cast<size_t>(PyDict_GET_SIZE(dicts_[i].ptr())) != ends_[i] - at) return false;
      Py_ssize_t place = 0;
      for (PyObject *key, *value; PyDict_Next(dicts_[i].ptr(), &place, &key, &value); ++at)
        if (value != values_[at].ptr()) return false;
    }
    return true;
  }

 private:
  std::vector<py::dict> dicts_;
  std::vector<py::object> values_;  // held, so that no other object takes an address
  std::vector<size_t> ends_;
};

// Tiles [n, 4] and pieces [m, 8] of a branch mask, for kernels that read them as tables.
py::tuple branch_tables(const py::array_t<i64, py::array::c_style>& starts,
                        const py::array_t<i32, py::array::c_style>& ptr,
                        const py::array_t<i32, py::array::c_style>& intervals, bool columns, int most, int pad) {
  static_assert(sizeof(BranchTile) == 4 * sizeof(i32) && sizeof(BranchPiece) == 8 * sizeof(i32));
  const BranchMaskView mask{starts.data(), ptr.data(), intervals.data(), starts.shape(0) - 1, columns};
  const BranchPlan plan = BranchPlanner(mask, most, 1, pad).run();
  py::array_t<i32> tiles({static_cast<py::ssize_t>(plan.tiles.size()), static_cast<py::ssize_t>(4)});
  py::array_t<i32> pieces({static_cast<py::ssize_t>(plan.pieces.size()), static_cast<py::ssize_t>(8)});
  std::copy_n(reinterpret_cast<const i32*>(plan.tiles.data()), plan.tiles.size() * 4, tiles.mutable_data());
  std::copy_n(reinterpret_cast<const i32*>(plan.pieces.data()), plan.pieces.size() * 8, pieces.mutable_data());
  return py::make_tuple(tiles, pieces);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Tree of spans, page allocator and planner (C++). Used through anabranch.TreeCache and anabranch.Plan.";

  auto name_as_public = [](py::object type, const char* doc) {
    type.attr("__module__") = "anabranch";
    type.attr("__doc__") = doc;
  };
  name_as_public(py::register_exception<OutOfPages>(m, "OutOfPages", PyExc_RuntimeError),
                 "No pages are left for a step. Raised before anything changed: release or truncate branches and retry.");
  name_as_public(py::register_exception<DeadBranch>(m, "DeadBranch", PyExc_RuntimeError),
                 "A branch was used after it was released or joined.");

  py::class_<Branch>(m, "Branch", "One line of thought: an ordered list of spans of KV tokens. Made by TreeCache.")
      .def_property_readonly("length", [](const Branch& b) { return b.state("length").length; },
                             "Number of tokens in its context.")
      .def_property_readonly("position", [](const Branch& b) { return b.state("position").position; },
                             "Logical position of its next token.")
      .def_property_readonly("alive", &Branch::alive, "False once released or joined.")
      .def_property_readonly("fork_length", [](const Branch& b) { return b.state("fork_length").fork_length; },
                             "Context length at its fork; tokens beyond are its own.")
      .def_property_readonly("serial", [](const Branch& b) { return b.serial; }, "A number no other branch of the cache has.")
      .def("__repr__", [](const Branch& b) {
        if (!b.alive()) return "Branch(" + std::to_string(b.serial) + ", dead)";
        const BranchState& s = b.state();
        return "Branch(" + std::to_string(b.serial) + ", length=" + std::to_string(s.length) +
               ", position=" + std::to_string(s.position) + ")";
      });

  py::class_<HeldValues>(m, "HeldValues", "The objects that dictionaries held when this was made.")
      .def(py::init<std::vector<py::dict>>(), py::arg("dicts"))
      .def("same", &HeldValues::same, "Whether each still holds those very objects, in that order, and no more.");

  py::class_<Step>(m, "Step")
      .def_property_readonly("num_rows", [](const Step& s) { return s.state.slots.size(); })
      .def("slots", [](const Step& s) { return array_of(std::vector<i32>(s.state.slots)); })
      .def("positions", [](const Step& s) { return array_of(std::vector<i64>(s.state.positions)); })
      .def("row_ptr", [](const Step& s) { return array_of(std::vector<i32>(s.state.row_ptr)); })
      .def("copies",
           [](const Step& s) {  // [3, n]: src, dst, filled
             const size_t n = s.state.copies.size();
             py::array_t<i32> out({static_cast<py::ssize_t>(3), static_cast<py::ssize_t>(n)});
             i32* p = out.mutable_data();
             for (size_t i = 0; i < n; ++i) {
               p[i] = s.state.copies[i].src;
               p[n + i] = s.state.copies[i].dst;
               p[2 * n + i] = s.state.copies[i].filled;
             }
             return out;
           })
      .def_property_readonly("num_copies", [](const Step& s) { return s.state.copies.size(); })
      .def("moved_on", &Step::moved_on)
      .def("queries",
           [](const Step& s) -> py::object {  // (row of the step, position offset) of each query row; None: the rows
             if (s.state.read_ptr.empty()) return py::none();
             Contexts c = contexts_of(*s.tree, s.state);
             if (c.row_of.empty()) return py::none();
             return py::make_tuple(array_of(std::move(c.row_of)), array_of(std::move(c.row_offsets)));
           })
      .def("contexts", [](const Step& s) { return flat(contexts_of(*s.tree, s.state)); });

  py::class_<PlanParams>(m, "PlanParams")
      .def(py::init([](i32 group, i32 tile, i32 chunk, i32 parallelism, i32 num_kv_heads, i32 elem_size,
                       i32 narrow, bool fixed, i32 subtree, i32 parts) {
             return PlanParams{group, tile, chunk, parallelism, num_kv_heads, elem_size, narrow, subtree, parts, fixed};
           }),
           py::arg("group"), py::arg("tile"), py::arg("chunk"), py::arg("parallelism"), py::arg("num_kv_heads"),
           py::arg("elem_size"), py::arg("narrow") = 0, py::arg("fixed") = false, py::arg("subtree") = 0,
           py::arg("parts") = 0);

  py::class_<PlanResult>(m, "PlanResult")
      .def_readonly("build", &PlanResult::build)
      .def_readonly("advances", &PlanResult::advances)
      .def_property_readonly("kv", &PlanResult::kv)
      .def_property_readonly("work", &PlanResult::work)
      .def_property_readonly("strip", [](const PlanResult& r) { return r.data.strip; })
      .def_property_readonly("begin", &PlanResult::begin)
      .def_property_readonly("num_items", [](const PlanResult& r) { return r.data.num_items; })
      .def_property_readonly("num_partials", [](const PlanResult& r) { return r.data.num_partials; })
      .def_property_readonly("num_merge", [](const PlanResult& r) { return r.data.num_merge; })
      .def_property_readonly("tile_rows", [](const PlanResult& r) { return r.data.tile_rows; })
      .def_property_readonly("num_runs", [](const PlanResult& r) { return r.data.num_runs; })
      .def_property_readonly("num_absorbed", [](const PlanResult& r) { return r.data.num_absorbed; })
      .def_property_readonly("kv_tokens", [](const PlanResult& r) { return r.data.kv_tokens; })
      .def_property_readonly("num_rows", [](const PlanResult& r) { return r.data.num_rows; })
      .def_property_readonly("most_parts", [](const PlanResult& r) { return r.data.most_parts; })
      .def_property_readonly("num_wide", [](const PlanResult& r) { return r.data.num_wide; });

  m.def("plan_layout", [] { return py::make_tuple(kSectionNames, kItemFieldNames, kItemFields); },
        "Names of a plan's sections and of an item's fields, in order, and the stride of an item (csrc/plan/layout.hpp).");

  py::class_<BlockTables>(m, "BlockTables")
      .def(py::init<const py::array_t<i32, py::array::c_style>&, const py::array_t<i64, py::array::c_style>&,
                    const py::array_t<i64, py::array::c_style>&, i32>())
      .def("follow", &BlockTables::follow)
      .def("plan", &BlockTables::plan)
      .def("appended", &BlockTables::appended)
      .def("contexts", &BlockTables::contexts)
      .def_property_readonly("max_page", &BlockTables::max_page)
      .def_property_readonly("unique_tokens", &BlockTables::unique_tokens);

  m.def("branch_tables", &branch_tables, py::arg("starts"), py::arg("ptr"), py::arg("intervals"), py::arg("columns"),
        py::arg("most"), py::arg("pad"),
        "A branch mask (row form, or column form with columns=True) cut into tiles of at most `most` tokens.");

  py::class_<Cache>(m, "Cache")
      .def(py::init<i32, i32>(), py::arg("num_pages"), py::arg("page_size"))
      .def("branch", &Cache::branch)
      .def("fork", &Cache::fork)
      .def("step", &Cache::step, py::arg("rows"), py::arg("positions"), py::arg("views") = py::dict())
      .def("share", &Cache::share)
      .def("join", &Cache::join)
      .def("discard", &Cache::discard)
      .def("truncate", &Cache::truncate)
      .def("release", &Cache::release)
      .def("keep", &Cache::keep)
      .def("kept_pages",
           [](const Cache& c, const Branch& b, i64 length) { return c.tree()->kept_pages(c.mine(b, "keep").id, length); })
      .def_property_readonly("pages_needed", [](const Cache& c) { return c.tree()->pages_needed(); })
      .def("check_branch", [](const Cache& c, const Branch& b, const char* what) { c.mine(b, what); })
      .def("plan", &Cache::plan)
      .def("plan_stats", &Cache::stats)
      .def("usage",
           [](const Cache& c) {
             const Usage u = c.tree()->usage();
             return py::make_tuple(u.pages_total, u.pages_free, u.tokens_logical, u.tokens_physical, u.pages_copied,
                                   u.pages_kept);
           })
      .def("slots", [](const Cache& c, const Branch& b) { return array_of(c.tree()->slots(c.mine(b, "read").id)); })
      .def("positions",
           [](const Cache& c, const Branch& b) { return array_of(c.tree()->positions(c.mine(b, "positions").id)); })
      .def("check", [](const Cache& c) { c.tree()->check(); });
}
