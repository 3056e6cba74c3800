// How a plan names tokens: by strips, not one by one.
//
// A strip is `size` places, a power of two that divides the page size. Its entry is a slot and a position: the token at
// place i has slot + i and position + i. So a page of 16 tokens takes one entry. Where the tokens of a strip do not lie side
// by side (a run goes on in another page in the middle of a strip, or positions jump), the entry's slot is ~e, and slot and
// position of place i are spelled out in entry e + i of the tokens. Entry 0 of the tokens is nobody's: a device that
// appends tokens writes there what it need not write.
//
// A range of tokens may begin at any place of its first strip: at that which leaves most of its tokens side by side.
#pragma once

#include <algorithm>
#include <vector>

#include "plan/plan.hpp"

namespace anabranch {

constexpr i32 kMaxStrip = 16;

inline i32 strip_of(i32 page_size) { return std::min(page_size & -page_size, kMaxStrip); }

// A range in the strips.
struct Stored {
  i64 place;         // of its first token
  i32 max_position;  // of all its tokens
};

// Writes strips.
class Strips {
 public:
  struct Slice {  // tokens [from, from + count) of a piece
    const Contexts::Piece* piece;
    i32 from, count;
  };

  // ranges, places: how many there will be at most, free places included.
  Strips(i32 page_size, i64 ranges, i64 places);

  // A range; `slack`: free places behind it. grows: it is to go on side by side with its last token.
  Stored store(const std::vector<Slice>& slices, i32 slack, bool grows);

  i32 size() const { return size_; }
  const i32* entries() const { return buffer_.get(); }
  const i32* tokens() const { return buffer_.get() + tokens_at_; }
  // Both, where the tokens begin in it, and where they end.
  const std::shared_ptr<i32[]>& buffer() const { return buffer_; }
  i64 tokens_at() const { return tokens_at_; }
  i64 end() const { return tokens_at_ + 2 * num_tokens_; }

 private:
  void put(const Contexts::Piece& piece, i32 from, i32 count);
  void put_pages(const Contexts::Piece& piece, i32 from, i32 count);
  void put_together(i32 slot, i32 position, i32 n);  // n tokens side by side, not beyond the strip
  void spell_out(i32* entry, i32 used);

  const i32 page_size_, size_;
  i64 tokens_at_;
  std::shared_ptr<i32[]> buffer_;
  i64 num_tokens_ = 1;
  i64 place_ = 0;  // of the next token
  i64 begin_ = 0;  // of the range
};

// Whether one more token can go to `place`, behind the one before it; and putting it there. Returns the entry that says so
// now; null where none had to be changed.
bool may_append(const i32* strips, i32 size, i64 place, i32 slot, i32 position);
i32* append(i32* strips, i32* tokens, i32 size, i64 place, i32 slot, i32 position);

// The largest position of the tokens at places [begin, begin + n).
i32 max_position(const i32* strips, const i32* tokens, i32 size, i64 begin, i32 n);

}  // namespace anabranch
