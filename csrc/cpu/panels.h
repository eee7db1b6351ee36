// Rows of dy or x in the order in which outer_product.h reads them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "convert.h"
#include "simd.h"
#include "transpose_floats.h"

namespace sparseft {

using torch::headeronly::ScalarType;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

// A matrix that owns nothing: fp32, bf16 or fp16, with any strides.
struct Matrix {
    const char* data;
    int64_t rows, columns, row_stride, column_stride, element_size;
    ScalarType dtype;

    const char* at(int64_t row, int64_t column) const {
        return data + (row * row_stride + column * column_stride) * element_size;
    }
};

template <class T>
SPARSEFT_SIMD void widen_strided(const T* values, int64_t stride, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(values[i * stride]);
}

// `n` values that lie `stride` apart as fp32 without gaps: in place where they are that, else in `space`.
inline const float* read(ScalarType dtype, const void* values, int64_t stride, int64_t n, float* space) {
    using torch::headeronly::BFloat16;
    using torch::headeronly::Half;
    if (stride == 1 && dtype == ScalarType::Float) return static_cast<const float*>(values);
    if (stride == 1) {
        widen(dtype, values, n, space);
    } else if (dtype == ScalarType::Float) {
        widen_strided(static_cast<const float*>(values), stride, n, space);
    } else if (dtype == ScalarType::BFloat16) {
        widen_strided(static_cast<const BFloat16*>(values), stride, n, space);
    } else {
        widen_strided(static_cast<const Half*>(values), stride, n, space);
    }
    return space;
}

// A matrix as fp32, cut into panels of `kWidth` columns, [panels, rows, kWidth]. The last one is filled up with zeros.
template <int64_t kWidth>
class Panels {
  public:
    // near: the source is in a cache already, see ahead.h.
    void pack(const Matrix& source, bool near = false) {
        rows_ = source.rows;
        count_ = ceil_div(source.columns, kWidth);
        lines_.resize(std::max<size_t>(lines_.size(), ceil_div(count_ * rows_ * kWidth, kLine)));
        if (source.columns % kWidth != 0) std::fill_n((*this)[count_ - 1], rows_ * kWidth, 0.0f);
        source.column_stride == 1 ? pack_rows(source, near) : pack_columns(source);
    }

    int64_t rows() const { return rows_; }
    int64_t count() const { return count_; }
    float* operator[](int64_t panel) { return lines_.data()->values + panel * rows_ * kWidth; }
    const float* operator[](int64_t panel) const { return lines_.data()->values + panel * rows_ * kWidth; }

  private:
    static constexpr int64_t kLineBytes = 64;
    static constexpr int64_t kLine = kLineBytes / sizeof(float);
    static constexpr int64_t kRowsAtOnce = 8;
    static constexpr int64_t kColumnPart = 64;  // of a column, that its panel's lines stay in the first-level cache

    struct alignas(kLineBytes) Line {  // of the cache, which no vector then straddles
        float values[kLine];
    };

    void pack_rows(const Matrix& source, bool near) {
        const int64_t columns = source.columns, whole = columns / kWidth * kWidth;
        space_.resize(std::max<size_t>(space_.size(), kRowsAtOnce * columns));
        std::array<const float*, kRowsAtOnce> rows;
        for (int64_t first = 0; first < rows_; first += kRowsAtOnce) {
            const int64_t n = std::min(kRowsAtOnce, rows_ - first);
            for (int64_t i = 0; i < n; ++i) {
                rows[i] = read(source.dtype, source.at(first + i, 0), 1, columns, space_.data() + i * columns);
            }
            // a tile's part of a row is short: the processor would foresee little of the next one
            for (int64_t i = first + n; !near && i < std::min(first + n + kRowsAtOnce, rows_); ++i) {
                for (int64_t j = 0; j < columns; j += kLineBytes / source.element_size)
                    __builtin_prefetch(source.at(i, j));
            }
            float* out = (*this)[0] + first * kWidth;
            for (int64_t j = 0; j < whole; j += kWidth, out += rows_ * kWidth) {
                for (int64_t i = 0; i < n; ++i) std::memcpy(out + i * kWidth, rows[i] + j, kWidth * sizeof(float));
            }
            for (int64_t i = 0; i < n; ++i) std::copy(rows[i] + whole, rows[i] + columns, out + i * kWidth);
        }
    }

    // Where rows are close together and columns far apart, values are read along columns.
    void pack_columns(const Matrix& source) {
        if (source.row_stride == 1 && source.dtype == ScalarType::Float) {
            for (int64_t j = 0; j < source.columns; j += kWidth) {
                transpose(reinterpret_cast<const float*>(source.at(0, j)), source.column_stride,
                          std::min(kWidth, source.columns - j), rows_, (*this)[j / kWidth], kWidth);
            }
            return;
        }
        std::array<float, kColumnPart> space;
        for (int64_t j = 0; j < source.columns; ++j) {
            float* const out = (*this)[j / kWidth] + j % kWidth;
            for (int64_t first = 0; first < rows_; first += kColumnPart) {
                const int64_t n = std::min(kColumnPart, rows_ - first);
                const float* const column =
                    read(source.dtype, source.at(first, j), source.row_stride, n, space.data());
                for (int64_t i = 0; i < n; ++i) out[(first + i) * kWidth] = column[i];
            }
        }
    }

    int64_t rows_ = 0, count_ = 0;
    std::vector<Line> lines_;
    std::vector<float> space_;
};

}  // namespace sparseft
