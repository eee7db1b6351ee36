// Brings matrices nearer that are read next, little by little, while something else is computed.
#pragma once

#include <array>
#include <cstdint>

#include "panels.h"

namespace sparseft {

class Ahead {
  public:
    // Forget all matrices; those that are added next are there after so many steps.
    void begin(int64_t steps) {
        steps_ = steps;
        count_ = current_ = lines_ = owed_ = 0;
    }

    // At most kMost of them. One whose rows have gaps in them is left alone.
    void add(const Matrix& matrix) {
        if (matrix.column_stride != 1 || matrix.rows == 0) return;
        const int64_t lines = ceil_div(matrix.columns * matrix.element_size, kLineBytes);
        items_[count_++] = {matrix.at(0, 0), matrix.row_stride * matrix.element_size, matrix.rows, lines};
        lines_ += matrix.rows * lines;
    }

    // Whole rows at a time: steps stand between short loops, and must be short themselves.
    void step() {
        if (current_ == count_) return;
        for (owed_ += lines_; owed_ > 0 && current_ < count_;) {
            Item& item = items_[current_];
            for (int64_t line = 0; line < item.lines; ++line) __builtin_prefetch(item.row + line * kLineBytes, 0, 2);
            owed_ -= item.lines * steps_;
            item.row += item.stride;
            if (--item.rows == 0) ++current_;
        }
    }

  private:
    static constexpr int64_t kLineBytes = 64;
    static constexpr int64_t kMost = 4;

    struct Item {
        const char* row;
        int64_t stride, rows, lines;  // rows that are left; lines of the cache in each
    };

    std::array<Item, kMost> items_;
    int64_t count_ = 0, current_ = 0;
    int64_t steps_ = 1, lines_ = 0, owed_ = 0;  // lines of all; what should have been asked for by now, times steps_
};

}  // namespace sparseft
