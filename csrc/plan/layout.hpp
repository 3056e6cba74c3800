// The layout of a plan, named once: the sections of its two int32 buffers, and the fields of a work item.
// `anabranch._core.plan_layout()` hands the names to Python, where plan/layout.py has the same ones and a test compares.
// What each of them means is the contract in docs/kernel_contract.md.
#pragma once

#include <array>

namespace anabranch {

// Sections in this order: those before kItems say which tokens there are, and are a buffer of their own, since plans of
// sequences that only grow share it; the others are the work on them.
enum Section { kKvStrips, kKvSpelled, kItems, kRows, kLimits, kDest, kRowPositions, kMergeRows, kMergePtr, kSections };
constexpr std::array<const char*, kSections> kSectionNames = {
    "kv_strips", "kv_spelled", "items", "rows", "limits", "dest", "row_positions", "merge_rows", "merge_ptr"};

// Fields of a work item; it is padded to a power of two, so that a row of `items` is two aligned vector loads.
enum ItemField { kKvBegin, kKvLen, kRowBegin, kRowCount, kMasked, kKvPosMax, kRowPosMin, kParts, kNamedFields };
constexpr std::array<const char*, kNamedFields> kItemFieldNames = {
    "kv_begin", "kv_len", "row_begin", "row_count", "masked", "kv_pos_max", "row_pos_min", "parts"};
constexpr int kItemFields = 8;
static_assert(kNamedFields <= kItemFields);

}  // namespace anabranch
