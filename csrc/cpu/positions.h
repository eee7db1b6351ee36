// Index lists of every form as what CPU loops take: plain positions, a block at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../selection.h"
#include "simd.h"

namespace sparseft {

constexpr int64_t kBlockEntries = 256;
constexpr int64_t kGroup = 32;  // entries of a packed list that are read together
constexpr int64_t kPositions = kBlockEntries + kGroup;

// Call `body(list)` with the index list as what it is: positions in int32 or int64, or a PackedList.
template <class Body>
auto with_list(const Selection& at, const Body& body) {
    if (at.form == IndexForm::kPacked) return body(packed_list(at));
    if (at.form == IndexForm::kInt64) return body(static_cast<const int64_t*>(at.indices));
    return body(static_cast<const int32_t*>(at.indices));
}

template <class Index>
SPARSEFT_SIMD void read(const Index* list, int64_t begin, int64_t end, int64_t&, int64_t* __restrict positions) {
    for (int64_t i = begin; i < end; ++i) positions[i - begin] = list[i];
}

// `block`: where entry `begin` is, or begin - 1; on return, where end - 1 is. Blocks have few entries, and uneven
// numbers of them, which a loop is slow to end at: kGroup are read at a time, and those of other blocks once more.
SPARSEFT_SIMD inline void read(const PackedList& list, int64_t begin, int64_t end, int64_t& block,
                               int64_t* __restrict positions) {
    const int64_t last_group = list.starts[list.blocks] - kGroup;
    const int16_t* const offsets = list.offsets;
    for (int64_t i = begin;; ++block) {
        const int64_t stop = std::min<int64_t>(end, list.starts[block + 1]), first = block * kPackBlock;
        for (; i < stop && i <= last_group; i += kGroup) {
            for (int64_t j = i; j < i + kGroup; ++j) positions[j - begin] = first + offsets[j];
        }
        for (; i < stop; ++i) positions[i - begin] = first + offsets[i];
        i = stop;
        if (i == end) return;
    }
}

inline int64_t block_of(const void*, int64_t) { return 0; }

inline int64_t block_of(const PackedList& list, int64_t entry) {
    return std::upper_bound(list.starts, list.starts + list.blocks, entry) - list.starts - 1;
}

// Reads the positions of a Selection, in order. The list must have been checked.
class PositionReader {
  public:
    PositionReader() = default;

    // From entry `begin` on, which must exist.
    PositionReader(const Selection& at, int64_t begin) : at_(&at), next_(begin) {
        block_ = with_list(at, [&](const auto& list) { return block_of(list, begin); });
    }

    // Fill `positions`, which has room for kPositions, with those of the next n entries, 1 to kBlockEntries.
    void read(int64_t n, int64_t* positions) {
        with_list(*at_, [&](const auto& list) { sparseft::read(list, next_, next_ + n, block_, positions); });
        next_ += n;
    }

  private:
    const Selection* at_ = nullptr;
    int64_t next_ = 0;
    int64_t block_ = 0;  // of a packed list, at entry next_ or before
};

// Call `body(i, position)` for entries begin..end.
template <class Body>
void for_each_position(const Selection& at, int64_t begin, int64_t end, const Body& body) {
    if (begin == end) return;
    PositionReader reader(at, begin);
    int64_t positions[kPositions];
    for (int64_t first = begin; first < end; first += kBlockEntries) {
        const int64_t n = std::min(kBlockEntries, end - first);
        reader.read(n, positions);
        for (int64_t i = 0; i < n; ++i) body(first + i, positions[i]);
    }
}

template <class Index>
int64_t first_from(const Index* list, int64_t k, int64_t position) {
    return std::lower_bound(list, list + k, position) - list;
}

inline int64_t first_from(const PackedList& list, int64_t k, int64_t position) {
    const int64_t block = position / kPackBlock;
    if (block >= list.blocks) return k;
    const int64_t start = list.starts[block];
    return start + first_from(list.offsets + start, list.starts[block + 1] - start, position % kPackBlock);
}

// The first entry at `position` or behind it, `at.k` if there is none. The list must have been checked.
inline int64_t first_from(const Selection& at, int64_t position) {
    return with_list(at, [&](const auto& list) { return first_from(list, at.k, position); });
}

}  // namespace sparseft
