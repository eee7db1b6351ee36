// Moves selected entries between a tensor and a compact block, as bytes: no dtype is interpreted, so none is changed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "../entry_ops.h"
#include "check_indices.h"
#include "positions.h"
#include "work_list.h"

namespace sparseft {

// Entries begin..begin + n of a Selection. Up to kBlockEntries, `positions` repeats the last one.
struct EntryBlock {
    int64_t begin;
    int64_t n;
    alignas(64) int64_t positions[kPositions];
};

// The same with what has the Selection as its member `at`.
template <class Item>
struct BlockOf : EntryBlock {
    const Item* item;
};

// How many blocks ahead the cache lines of entries are asked for: these lie too far apart for the machine to see a
// pattern.
constexpr int64_t kBlocksAhead = 2;

// Call `body(block, ahead)` for each block, a BlockOf<Item>, of a thread's share of `items`. `ahead` is the one that
// comes kBlocksAhead later, whosever it is, or `block` itself where there is none.
template <class Item, class ForEachPiece, class Body>
void for_each_block(const std::vector<Item>& items, const ForEachPiece& for_each_piece, const Body& body) {
    BlockOf<Item> blocks[kBlocksAhead + 1];
    PositionReader reader;
    const Item* item = nullptr;
    int64_t read = 0, done = 0;
    const auto place = [&](int64_t i) -> BlockOf<Item>& { return blocks[i % (kBlocksAhead + 1)]; };
    for_each_piece([&](const Piece& piece) {
        BlockOf<Item>& block = place(read++);
        block.item = &items[piece.tensor];
        block.begin = piece.begin;
        block.n = piece.end - piece.begin;
        if (std::exchange(item, block.item) != item) reader = {item->at, piece.begin};
        reader.read(block.n, block.positions);
        std::fill(block.positions + block.n, block.positions + kBlockEntries, block.positions[block.n - 1]);
        if (read - done > kBlocksAhead) body(place(done++), block);
    });
    for (; done < read; ++done) body(place(done), place(done));
}

// The memory lines of a block's entries, to be asked for while others are worked on. Into the second-level cache: the
// few lines that the first one can wait for at a time would hold the loop up.
class Lines {
  public:
    Lines(const void* data, int element_size, const EntryBlock& block)
        : data_(static_cast<const char*>(data)), size_(element_size), positions_(block.positions), n_(block.n) {}

    // The line of entry i of kBlockEntries, which may be beyond the block.
    void ask(int64_t i) const { __builtin_prefetch(data_ + positions_[i] * size_, 0, 2); }

    // Those from entry i on.
    void ask_rest(int64_t i) const {
        for (; i < n_; ++i) ask(i);
    }

  private:
    const char* data_;
    int64_t size_;
    const int64_t* positions_;
    int64_t n_;
};

// Call `body(size)` with the size of an element, in bytes, as a compile-time constant.
template <class Body>
void with_size(int size, const Body& body) {
    switch (size) {
        case 1:
            return body(std::integral_constant<int, 1>{});
        case 2:
            return body(std::integral_constant<int, 2>{});
        case 4:
            return body(std::integral_constant<int, 4>{});
        case 8:
            return body(std::integral_constant<int, 8>{});
        default:
            return body(std::integral_constant<int, 16>{});
    }
}

inline void gather_entries(const EntryBlock& block, const void* data, int element_size, void* values, Lines ahead) {
    with_size(element_size, [&](auto size) {
        const char* const in = static_cast<const char*>(data);
        char* const out = static_cast<char*>(values);
        for (int64_t i = 0; i < block.n; ++i) {
            ahead.ask(i);
            std::memcpy(out + i * size, in + block.positions[i] * size, size);
        }
    });
    ahead.ask_rest(block.n);
}

inline void scatter_entries(const EntryBlock& block, void* data, int element_size, const void* values) {
    with_size(element_size, [&](auto size) {
        const char* const in = static_cast<const char*>(values);
        char* const out = static_cast<char*>(data);
        for (int64_t i = 0; i < block.n; ++i) std::memcpy(out + block.positions[i] * size, in + i * size, size);
    });
}

inline void swap_entries(const EntryBlock& block, void* data, int element_size, void* values, Lines ahead) {
    with_size(element_size, [&](auto size) {
        char* const inout = static_cast<char*>(values);
        for (int64_t i = 0; i < block.n; ++i) {
            ahead.ask(i);
            char* const entry = static_cast<char*>(data) + block.positions[i] * size;
            char replaced[size];
            std::memcpy(replaced, entry, size);
            std::memcpy(entry, inout + i * size, size);
            std::memcpy(inout + i * size, replaced, size);
        }
    });
    ahead.ask_rest(block.n);
}

// Gather the same entries of two tensors of 2- or 4-byte elements in one go, which keeps twice as many cache misses
// under way as one after the other would.
inline void gather_two(const EntryBlock& block, const void* data, int element_size, void* values, Lines ahead,
                       const void* other, int other_size, void* other_values, Lines other_ahead) {
    const auto run = [&](auto size, auto size_of_other) {
        const char* const in = static_cast<const char*>(data);
        const char* const other_in = static_cast<const char*>(other);
        char* const out = static_cast<char*>(values);
        char* const other_out = static_cast<char*>(other_values);
        for (int64_t i = 0; i < block.n; ++i) {
            ahead.ask(i);
            other_ahead.ask(i);
            const int64_t position = block.positions[i];
            std::memcpy(out + i * size, in + position * size, size);
            std::memcpy(other_out + i * size_of_other, other_in + position * size_of_other, size_of_other);
        }
    };
    constexpr std::integral_constant<int, 2> two;
    constexpr std::integral_constant<int, 4> four;
    if (element_size == 4) {
        other_size == 4 ? run(four, four) : run(four, two);
    } else {
        other_size == 4 ? run(two, four) : run(two, two);
    }
    ahead.ask_rest(block.n);
    other_ahead.ask_rest(block.n);
}

// Where entry_ops.h has entries moved.
struct CpuEntries {
    explicit CpuEntries(const Tensor&) {}

    void check_indices(const char* op, const char* tensors, const std::vector<Exchange>& exchanges) const {
        sparseft::check_indices(op, tensors, exchanges);
    }

    void gather(const std::vector<Exchange>& exchanges) const { move(exchanges, gather_entries); }

    void swap(const std::vector<Exchange>& exchanges) const { move(exchanges, swap_entries); }

  private:
    template <class Move>
    static void move(const std::vector<Exchange>& exchanges, const Move& move_entries) {
        const WorkList work(exchanges.size(), kBlockEntries, [&](size_t i) { return exchanges[i].at.k; });
        work.parallel(8192, [&](const auto& for_each_piece) {
            for_each_block(exchanges, for_each_piece, [&](const auto& block, const auto& ahead) {
                const auto& [at, values] = *block.item;
                const Selection& next = ahead.item->at;
                move_entries(block, at.data, at.element_size,
                             static_cast<char*>(values) + block.begin * at.element_size,
                             Lines(next.data, next.element_size, ahead));
            });
        });
    }
};

}  // namespace sparseft
