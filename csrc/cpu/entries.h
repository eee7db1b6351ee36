// Moves selected entries between a tensor and a compact block, as bytes: no dtype is interpreted, so none is changed.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../entry_ops.h"
#include "work_list.h"

namespace sparseft {

template <int kSize, class Index, class Body>
void for_each_entry(const Selection& at, int64_t begin, int64_t end, const Body& body) {
    char* data = static_cast<char*>(at.data);
    const Index* indices = static_cast<const Index*>(at.indices);
    constexpr std::integral_constant<int, kSize> size;
    for (int64_t i = begin; i < end; ++i) body(data + int64_t{indices[i]} * kSize, (i - begin) * kSize, size);
}

// Call `body(entry, offset, size)` for the selected entries begin..end: the address of the entry, the offset in bytes
// of its value in a compact block that starts at `begin`, and its size as a compile-time constant.
template <class Body>
void for_each_entry(const Selection& at, int64_t begin, int64_t end, const Body& body) {
    const auto run = [&](auto size) {
        if (at.wide_indices) {
            for_each_entry<size, int64_t>(at, begin, end, body);
        } else {
            for_each_entry<size, int32_t>(at, begin, end, body);
        }
    };
    switch (at.element_size) {
        case 1:
            return run(std::integral_constant<int, 1>{});
        case 2:
            return run(std::integral_constant<int, 2>{});
        case 4:
            return run(std::integral_constant<int, 4>{});
        case 8:
            return run(std::integral_constant<int, 8>{});
        default:
            return run(std::integral_constant<int, 16>{});
    }
}

inline void gather_entries(const Selection& at, int64_t begin, int64_t end, void* values) {
    for_each_entry(at, begin, end, [values](const char* entry, int64_t offset, auto size) {
        std::memcpy(static_cast<char*>(values) + offset, entry, size);
    });
}

inline void scatter_entries(const Selection& at, int64_t begin, int64_t end, const void* values) {
    for_each_entry(at, begin, end, [values](char* entry, int64_t offset, auto size) {
        std::memcpy(entry, static_cast<const char*>(values) + offset, size);
    });
}

inline void swap_entries(const Selection& at, int64_t begin, int64_t end, void* values) {
    for_each_entry(at, begin, end, [values](char* entry, int64_t offset, auto size) {
        char replaced[size];
        char* value = static_cast<char*>(values) + offset;
        std::memcpy(replaced, entry, size);
        std::memcpy(entry, value, size);
        std::memcpy(value, replaced, size);
    });
}

// Where entry_ops.h has entries moved.
struct CpuEntries {
    explicit CpuEntries(const Tensor&) {}

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
        work.parallel(8, [&](const auto& for_each_piece) {
            for_each_piece([&](const Piece& piece) { body(exchanges[piece.tensor], piece.begin, piece.end); });
        });
    }
};

}  // namespace sparseft
