// Plans over a user's own block tables, and what they owe to those of the step before.
//
// A serving loop hands over tables that grow a little at each step. Plans of the longer sequences are then made of the
// earlier ones: the strips are shared, since an earlier plan does not look behind its own tokens, and what depends on
// the lengths, the work, is copied and advanced. Both stay valid.
#pragma once

#include <list>
#include <memory>

#include "plan/plan.hpp"

namespace anabranch {

class TablePlans {
 public:
  explicit TablePlans(Tables tables) : tables_(std::move(tables)) {}

  // Whether `now` are the same sequences, each longer by a few tokens or none, with one query row or none.
  bool grow_into(const Tables& now) const;
  // Takes over, advanced, the plans of tables that grew into these ones.
  void follow(const TablePlans& before);

  const PlanData& plan(const PlanParams& params);
  struct Appended {
    i32 at;  // in PlanData::kv, in pairs
    i32 slot, position;
  };
  // What the plan's strips have beside those of the plan before it; null where it was made from nothing.
  const std::vector<Appended>* appended(const PlanParams& params) const;

  const Tables& tables() const { return tables_; }
  const Contexts& contexts();

 private:
  struct Kept {
    PlanParams params;
    PlanData data;
    Tails tails;
    i64 age = 0;                   // plans before it with the same strips
    std::shared_ptr<i64> newest;   // age of the one that may append to them
    bool followed = false;
    std::vector<Appended> appended;
  };
  bool advance(Kept& plan, const Tables& before) const;

  Tables tables_;
  std::unique_ptr<Contexts> contexts_;  // made when first needed
  std::list<Kept> kept_;
};

}  // namespace anabranch
