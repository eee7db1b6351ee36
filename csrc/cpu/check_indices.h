// The check that CPU loops over selected entries rely on: they write wherever an index points.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "positions.h"
#include "simd.h"
#include "work_list.h"

namespace sparseft {

template <class Index>
SPARSEFT_SIMD bool ascending(const Index* indices, int64_t n) {
    Index broken = 0;  // as wide as the indices, so that comparing them fills whole vector registers
    for (int64_t i = 1; i < n; ++i) broken |= indices[i - 1] >= indices[i];
    return broken == 0;
}

// Entries begin..end of an index list lie inside the tensor, each above the one before it.
template <class Index>
bool valid(const Index* indices, int64_t begin, int64_t end, int64_t numel) {
    const int64_t from = std::max<int64_t>(begin - 1, 0);
    return indices[begin] >= 0 && indices[end - 1] < numel && ascending(indices + from, end - from);
}

inline bool valid_starts(const int32_t*, int64_t) { return true; }
inline bool valid_starts(const int64_t*, int64_t) { return true; }

// The starts of a packed list's blocks are in order, and inside the list. Nothing may be looked up by them before.
SPARSEFT_SIMD inline bool valid_starts(const PackedList& list, int64_t k) {
    int32_t broken = 0;
    for (int64_t b = 0; b < list.blocks; ++b) broken |= list.starts[b] > list.starts[b + 1];
    return broken == 0 && list.starts[0] == 0 && list.starts[list.blocks] == k;
}

inline bool outside_block(int16_t offset) { return offset & static_cast<int16_t>(~(kPackBlock - 1)); }

// All n offsets are inside a block, and `descents` of them, fewer than 2^15, not above the one before.
SPARSEFT_SIMD inline bool valid_offsets(const int16_t* offsets, int64_t n, int16_t descents) {
    int16_t outside = 0, found = 0;
    for (int64_t i = 0; i < n; ++i) outside |= outside_block(offsets[i]);
    for (int64_t i = 1; i < n; ++i) found += offsets[i - 1] >= offsets[i];
    return outside == 0 && found == descents;
}

// The same of a packed list. Offsets descend only where a block begins, so that both are counted and compared: that
// takes no loop over each block, of which there may be many.
inline bool valid(const PackedList& list, int64_t begin, int64_t end, int64_t numel) {
    const int64_t from = std::max<int64_t>(begin - 1, 0);
    int64_t block = std::upper_bound(list.starts, list.starts + list.blocks, from) - list.starts;
    int16_t descents = 0;
    for (; block < list.blocks && list.starts[block] < end; ++block) {
        const int64_t start = list.starts[block];
        const bool empty = start == list.starts[block + 1];  // begins where the next one does
        descents += !empty && list.offsets[start - 1] >= list.offsets[start];
    }
    const int64_t last = (block - 1) * kPackBlock + list.offsets[end - 1];
    return last < numel && valid_offsets(list.offsets + from, end - from, descents);
}

inline void explain(const Argument&, const int32_t*, int64_t) {}
inline void explain(const Argument&, const int64_t*, int64_t) {}

inline void explain(const Argument& argument, const PackedList& list, int64_t k) {
    constexpr const char* remedy = "; it is damaged, or of another tensor: use a mask made for this model";
    check(valid_starts(list, k), argument, " must say, packed as int16, how many of its ", k,
          " entries lie before each block, got counts that do not go from 0 to ", k, remedy);
    const int16_t* const bad = std::find_if(list.offsets, list.offsets + k, outside_block);
    check(bad == list.offsets + k, argument, " must have, packed as int16, positions from 0 to ", kPackBlock - 1,
          " inside each block, got ", bad == list.offsets + k ? 0 : *bad, " at ", bad - list.offsets, remedy);
}

// Fail if an index list is not sorted, unique and inside its tensor.
inline void explain(const char* op, const char* tensors, const Selection& at) {
    const Argument argument{op, "indices", at.place};
    with_list(at, [&](const auto& list) { explain(argument, list, at.k); });
    int64_t first = 0, before = 0;
    for_each_position(at, 0, at.k, [&](int64_t i, int64_t position) {
        check(i == 0 || before < position, argument, " must be sorted and unique, got ", position, " after ", before,
              " at ", i, "; sort it and drop repeated entries");
        if (i == 0) first = position;
        before = position;
    });
    const std::string tensor = at.place < 0 ? tensors : tensors + ('[' + std::to_string(at.place) + ']');
    check(first >= 0 && before < at.numel, argument, " must be from 0 to ", at.numel - 1, ", inside ", tensor,
          ", got ", first, " to ", before, "; use a mask made for this model");
}

// Fail unless every index list of a call is sorted, unique and inside its tensor. `items` have a Selection `at` each,
// of at least one entry, into the tensors of the op's list `tensors`, or into what is called so.
template <class Item>
void check_indices(const char* op, const char* tensors, const std::vector<Item>& items) {
    std::atomic<bool> all_valid{true};
    for (const Item& item : items) {
        const auto starts_are_valid = [&](const auto& list) { return valid_starts(list, item.at.k); };
        if (!with_list(item.at, starts_are_valid)) explain(op, tensors, item.at);
    }
    const WorkList work(items.size(), 4096, [&](size_t i) { return items[i].at.k; });
    work.parallel(16384, [&](const auto& for_each_piece) {
        for_each_piece([&](const Piece& piece) {
            const Selection& at = items[piece.tensor].at;
            const auto piece_is_valid = [&](const auto& list) {
                return valid(list, piece.begin, piece.end, at.numel);
            };
            if (!with_list(at, piece_is_valid)) all_valid.store(false, std::memory_order_relaxed);
        });
    });
    if (all_valid) return;
    for (const Item& item : items) explain(op, tensors, item.at);
}

}  // namespace sparseft
