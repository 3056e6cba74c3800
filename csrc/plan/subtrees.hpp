// Items that hold a subtree: rows that stand side by side in a tree, with every short run that some of them see.
//
// In a deep tree with short nodes a row sees many short runs, and each would give it a partial result of its own, dearer
// than the products that lead to it. Where that is so, the rows of a tree are put in the order of its leaves and dealt to
// tiles. A tile is one item; the short runs that it sees are its parts, each for the consecutive rows that see it, and a
// kernel adds them all up before it writes anything.
#pragma once

#include "plan/runs.hpp"

namespace anabranch {

struct Subtrees {
  struct Tile {
    i32 begin, end;  // of `contexts`
  };
  struct Part {
    i32 run, begin, end;  // of `contexts`, within the tile
  };
  std::vector<i32> contexts;      // in the order of leaves
  std::vector<Tile> tiles;
  std::vector<Part> parts;        // of all tiles; ancestors come before what is below them
  std::vector<i32> part_ptr{0};   // [tiles + 1]
  std::vector<char> fused;        // by run: it is a part of tiles and of nothing else
};

Subtrees find_subtrees(const Contexts& contexts, const Runs& runs, const PlanParams& params);

}  // namespace anabranch
