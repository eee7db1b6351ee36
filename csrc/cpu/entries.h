// Moves selected entries between a tensor and a compact block, as bytes: no dtype is interpreted, so none is changed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../entry_ops.h"
#include "check_indices.h"
#include "work_list.h"

namespace sparseft {

// How many entries ahead their cache lines are asked for: entries lie too far apart for the machine to see a pattern.
constexpr int64_t kPrefetchDistance = 512;

// Into the second-level cache: the few lines that the first one can wait for at a time would hold the loop up.
inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// Call `body(i, position, position_ahead)` for selected entries begin..end, i counting from 0.
template <class Body>
void for_each_position(const Selection& at, int64_t begin, int64_t end, const Body& body) {
    const auto run = [&](const auto* indices) {
        for (int64_t i = begin; i < end; ++i) {
            body(i - begin, int64_t{indices[i]}, int64_t{indices[std::min(i + kPrefetchDistance, at.k - 1)]});
        }
    };
    with_indices(at, run);
}

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

inline void gather_entries(const Selection& at, int64_t begin, int64_t end, void* values) {
    with_size(at.element_size, [&](auto size) {
        const char* const data = static_cast<const char*>(at.data);
        char* const out = static_cast<char*>(values);
        for_each_position(at, begin, end, [=](int64_t i, int64_t position, int64_t ahead) {
            prefetch(data + ahead * size);
            std::memcpy(out + i * size, data + position * size, size);
        });
    });
}

inline void scatter_entries(const Selection& at, int64_t begin, int64_t end, const void* values) {
    with_size(at.element_size, [&](auto size) {
        char* const data = static_cast<char*>(at.data);
        const char* const in = static_cast<const char*>(values);
        for_each_position(at, begin, end, [=](int64_t i, int64_t position, int64_t) {
            std::memcpy(data + position * size, in + i * size, size);
        });
    });
}

inline void swap_entries(const Selection& at, int64_t begin, int64_t end, void* values) {
    with_size(at.element_size, [&](auto size) {
        char* const data = static_cast<char*>(at.data);
        char* const inout = static_cast<char*>(values);
        for_each_position(at, begin, end, [=](int64_t i, int64_t position, int64_t ahead) {
            prefetch(data + ahead * size);
            char replaced[size];
            std::memcpy(replaced, data + position * size, size);
            std::memcpy(data + position * size, inout + i * size, size);
            std::memcpy(inout + i * size, replaced, size);
        });
    });
}

// Gather the same entries of two tensors of 2- or 4-byte elements in one go, which keeps twice as many cache misses
// under way as one after the other would.
inline void gather_two(const Selection& at, int64_t begin, int64_t end, void* values, const void* other,
                       int other_size, void* other_values) {
    const auto run = [&](auto size, auto size_of_other) {
        const char* const data = static_cast<const char*>(at.data);
        const char* const other_data = static_cast<const char*>(other);
        char* const out = static_cast<char*>(values);
        char* const other_out = static_cast<char*>(other_values);
        for_each_position(at, begin, end, [=](int64_t i, int64_t position, int64_t ahead) {
            prefetch(data + ahead * size);
            prefetch(other_data + ahead * size_of_other);
            std::memcpy(out + i * size, data + position * size, size);
            std::memcpy(other_out + i * size_of_other, other_data + position * size_of_other, size_of_other);
        });
    };
    constexpr std::integral_constant<int, 2> two;
    constexpr std::integral_constant<int, 4> four;
    if (at.element_size == 4) {
        other_size == 4 ? run(four, four) : run(four, two);
    } else {
        other_size == 4 ? run(two, four) : run(two, two);
    }
}

// Where entry_ops.h has entries moved.
struct CpuEntries {
    explicit CpuEntries(const Tensor&) {}

    void check_indices(const char* op, const char* tensors, const std::vector<Exchange>& exchanges) const {
        sparseft::check_indices(op, tensors, exchanges);
    }

    void gather(const std::vector<Exchange>& exchanges) const {
        for_each_block(exchanges, [](const Exchange& e, int64_t begin, int64_t end) {
            gather_entries(e.at, begin, end, static_cast<char*>(e.values) + begin * e.at.element_size);
        });
    }

    void swap(const std::vector<Exchange>& exchanges) const {
        for_each_block(exchanges, [](const Exchange& e, int64_t begin, int64_t end) {
            swap_entries(e.at, begin, end, static_cast<char*>(e.values) + begin * e.at.element_size);
        });
    }

  private:
    template <class Body>
    static void for_each_block(const std::vector<Exchange>& exchanges, const Body& body) {
        const WorkList work(exchanges.size(), 1024, [&](size_t i) { return exchanges[i].at.k; });
        work.parallel(8192, [&](const auto& for_each_piece) {
            for_each_piece([&](const Piece& piece) { body(exchanges[piece.tensor], piece.begin, piece.end); });
        });
    }
};

}  // namespace sparseft
