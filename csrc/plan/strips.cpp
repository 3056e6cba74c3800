#include "plan/strips.hpp"

#include <limits>

namespace anabranch {

namespace {

i32 slot_of(const Contexts::Piece& piece, i32 i, i32 page_size) {
  if (piece.pages == nullptr) return piece.slots[i];
  return piece.pages[(piece.offset + i) / page_size] * page_size + (piece.offset + i) % page_size;
}

}  // namespace

// Room for all tokens to be spelled out; what is not used is never touched.
Strips::Strips(i32 page_size, i64 ranges, i64 places) : page_size_(page_size), size_(strip_of(page_size)) {
  const i64 strips = places / size_ + 2 * ranges;  // a range may begin and end within one
  tokens_at_ = (2 * strips + 3) / 4 * 4;
  buffer_ = std::shared_ptr<i32[]>(new i32[static_cast<size_t>(tokens_at_ + 2 * (1 + strips * size_))]);
  std::fill(buffer_.get() + tokens_at_, buffer_.get() + tokens_at_ + 2, 0);
}

Stored Strips::store(const std::vector<Slice>& slices, i32 slack, bool grows) {
  // The range begins at the place where the longest slice lies as in its pages, or the last one if that is to grow.
  i32 at = 0, phase = 0, longest = 0, max_position = std::numeric_limits<i32>::min();
  for (const Slice& s : slices) {
    if (grows || s.count > longest) {
      phase = (slot_of(*s.piece, s.from, page_size_) - at) & (size_ - 1);
      longest = s.count;
    }
    at += s.count;
  }
  place_ = begin_ = (place_ + size_ - 1) / size_ * size_ + phase;
  for (const Slice& s : slices) {
    if (s.piece->pages != nullptr) {
      put_pages(*s.piece, s.from, s.count);
      max_position = std::max(max_position, s.piece->position + s.from + s.count - 1);
    } else {
      put(*s.piece, s.from, s.count);
      const i32* positions = s.piece->positions + s.from;
      max_position = std::max(max_position, *std::max_element(positions, positions + s.count));
    }
  }
  place_ += slack;
  return {begin_, max_position};
}

void Strips::put(const Contexts::Piece& piece, i32 from, i32 count) {
  const i32 *slots = piece.slots + from, *positions = piece.positions + from;
  while (count > 0) {
    const i32 most = std::min(count, size_ - static_cast<i32>(place_ & (size_ - 1)));
    i32 n = 1;
    while (n < most && slots[n] == slots[0] + n && positions[n] == positions[0] + n) ++n;
    put_together(slots[0], positions[0], n);
    slots += n;
    positions += n;
    count -= n;
  }
}

void Strips::put_pages(const Contexts::Piece& piece, i32 from, i32 count) {
  i32 page = (piece.offset + from) / page_size_, within = (piece.offset + from) % page_size_;
  i32 position = piece.position + from;
  while (count > 0) {
    const i32 slot = piece.pages[page] * page_size_ + within;
    const i32 side_by_side = std::min(count, page_size_ - within);
    for (i32 done = 0; done < side_by_side;) {
      const i32 at = static_cast<i32>(place_ & (size_ - 1));
      i32 n = std::min(side_by_side - done, size_ - at);
      if (at == 0 && ((slot + done) & (size_ - 1)) == 0) {
        i32* entry = buffer_.get() + 2 * (place_ / size_);
        entry[0] = slot + done;
        entry[1] = position + done;
        place_ += n;
      } else {
        put_together(slot + done, position + done, n);
      }
      done += n;
    }
    position += side_by_side;
    count -= side_by_side;
    within = 0;
    ++page;
  }
}

void Strips::put_together(i32 slot, i32 position, i32 n) {
  i32* entry = buffer_.get() + 2 * (place_ / size_);
  const i32 at = static_cast<i32>(place_ & (size_ - 1));
  const bool first = at == 0 || place_ == begin_;
  if (first && slot % size_ == at) {
    entry[0] = slot - at;
    entry[1] = position - at;
  } else if (first || entry[0] < 0 || entry[0] != slot - at || entry[1] != position - at) {
    if (first || entry[0] >= 0) spell_out(entry, first ? 0 : at);
    i32* token = buffer_.get() + tokens_at_ + 2 * (~static_cast<i64>(entry[0]) + at);
    for (i32 i = 0; i < n; ++i, token += 2) {
      token[0] = slot + i;
      token[1] = position + i;
    }
  }
  place_ += n;
}

void Strips::spell_out(i32* entry, i32 used) {
  i32* token = buffer_.get() + tokens_at_ + 2 * num_tokens_;
  for (i32 i = 0; i < size_; ++i, token += 2) {
    token[0] = i < used ? entry[0] + i : 0;
    token[1] = i < used ? entry[1] + i : 0;
  }
  entry[0] = ~static_cast<i32>(num_tokens_);
  entry[1] = 0;
  num_tokens_ += size_;
}

bool may_append(const i32* strips, i32 size, i64 place, i32 slot, i32 position) {
  const i32 at = static_cast<i32>(place & (size - 1));
  if (at == 0) return slot % size == 0;
  const i32* entry = strips + 2 * (place / size);
  return entry[0] < 0 || (entry[0] == slot - at && entry[1] == position - at);
}

i32* append(i32* strips, i32* tokens, i32 size, i64 place, i32 slot, i32 position) {
  const i32 at = static_cast<i32>(place & (size - 1));
  i32* entry = strips + 2 * (place / size);
  i32* to = at == 0 ? entry : tokens + 2 * (~static_cast<i64>(entry[0]) + at);
  if (at != 0 && entry[0] >= 0) return nullptr;  // side by side with the one before
  to[0] = slot;
  to[1] = position;
  return to;
}

i32 max_position(const i32* strips, const i32* tokens, i32 size, i64 begin, i32 n) {
  i32 most = std::numeric_limits<i32>::min();
  for (i64 place = begin, end = begin + n; place < end;) {
    const i32* entry = strips + 2 * (place / size);
    const i32 at = static_cast<i32>(place & (size - 1));
    const i32 count = static_cast<i32>(std::min<i64>(end - place, size - at));
    if (entry[0] >= 0) {
      most = std::max(most, entry[1] + at + count - 1);
    } else {
      const i32* token = tokens + 2 * (~static_cast<i64>(entry[0]) + at);
      for (i32 i = 0; i < count; ++i) most = std::max(most, token[2 * i + 1]);
    }
    place += count;
  }
  return most;
}

}  // namespace anabranch
