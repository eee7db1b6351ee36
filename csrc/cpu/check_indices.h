// The check that CPU loops over selected entries rely on: they write wherever an index points.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "../selection.h"
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

template <class Index>
void explain(const char* op, const char* tensors, const Index* indices, const Selection& at) {
    const Argument argument{op, "indices", at.place};
    const Index* const end = indices + at.k;
    const Index* const first = std::adjacent_find(indices, end, std::greater_equal<Index>());
    if (first != end) {
        fail(argument, " must be sorted and unique, got ", first[1], " after ", *first, " at ", first + 1 - indices,
             "; sort it and drop repeated entries");
    }
    check(indices[0] >= 0 && end[-1] < at.numel, argument, " must be from 0 to ", at.numel - 1, ", inside ", tensors,
          '[', at.place, "], got ", indices[0], " to ", end[-1], "; use a mask made for this model");
}

// Call `body(indices)` with the index list as what it holds.
template <class Body>
auto with_indices(const Selection& at, const Body& body) {
    return at.wide_indices ? body(static_cast<const int64_t*>(at.indices))
                           : body(static_cast<const int32_t*>(at.indices));
}

// Fail unless every index list of a call is sorted, unique and inside its tensor. `items` have a Selection `at` each,
// of at least one entry, into the tensors of the op's list `tensors`.
template <class Item>
void check_indices(const char* op, const char* tensors, const std::vector<Item>& items) {
    const WorkList work(items.size(), 1024, [&](size_t i) { return items[i].at.k; });
    std::atomic<bool> all_valid{true};
    work.parallel(16384, [&](const auto& for_each_piece) {
        for_each_piece([&](const Piece& piece) {
            const Selection& at = items[piece.tensor].at;
            const auto piece_is_valid = [&](const auto* indices) {
                return valid(indices, piece.begin, piece.end, at.numel);
            };
            if (!with_indices(at, piece_is_valid)) all_valid.store(false, std::memory_order_relaxed);
        });
    });
    if (all_valid) return;
    for (const Item& item : items) {
        with_indices(item.at, [&](const auto* indices) { explain(op, tensors, indices, item.at); });
    }
}

}  // namespace sparseft
