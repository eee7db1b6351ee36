// Tiles of a Fisher diagonal on the CPU, and the products of rows of dy and x that are squared into them.
//
// A tile of the weight stays in the second-level cache while samples pass by: the product of one sample's dy and x
// goes into a buffer of the tile's size, and its squares are added to the Fisher diagonal at once. Threads share
// tiles.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "simd.h"

namespace sparseft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kTileRows = 256;  // a tile, its buffer and one sample's rows of dy and x fill about 1 MiB
inline constexpr int64_t kTileColumns = 512;
inline constexpr int64_t kSmallestTile = 16;  // rows or columns, below which products get slow
// multiplications, below which a second thread costs more than it saves
inline constexpr int64_t kSmallestShare = 1 << 20;

SPARSEFT_SIMD inline void add_squares(const float* __restrict product, float weight, int64_t n,
                                      float* __restrict fisher) {
    for (int64_t i = 0; i < n; ++i) fisher[i] += weight * (product[i] * product[i]);
}

// A matrix that owns nothing. Products go through these and never through the arguments themselves: those may require
// gradients, which autograd would record on worker threads.
struct Matrix {
    void* data;
    int64_t rows, columns, row_stride, column_stride;
    ScalarType dtype = ScalarType::Float;

    Matrix transposed() const { return {data, columns, rows, column_stride, row_stride, dtype}; }

    Tensor tensor() const {
        return torch::stable::from_blob(data, {rows, columns}, {row_stride, column_stride},
                                        torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
    }
};

// An fp32 copy without gaps, in `space`, which is grown to fit.
inline Matrix packed(const Matrix& source, std::vector<float>& space) {
    space.resize(std::max<size_t>(space.size(), source.rows * source.columns));
    const Matrix copy{space.data(), source.rows, source.columns, source.columns, 1};
    Tensor destination = copy.tensor();
    torch::stable::copy_(destination, source.tensor());
    return copy;
}

// What a matrix product can read in place: fp32 whose rows do not overlap, as rows of an expanded tensor do.
inline Matrix readable(const Matrix& source, std::vector<float>& space) {
    const bool in_place =
        source.dtype == ScalarType::Float && source.column_stride == 1 && source.row_stride >= source.columns;
    return in_place ? source : packed(source, space);
}

inline void multiply(const Matrix& left, const Matrix& right, const Matrix& out) {
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack = {from(left.tensor()), from(right.tensor()), from(out.tensor())};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
}

struct Tile {
    int64_t row_begin, row_end, column_begin, column_end;

    int64_t rows() const { return row_end - row_begin; }
    int64_t columns() const { return column_end - column_begin; }
};

// The buffers of one thread.
struct Buffers {
    std::vector<float> product, x, dy;

    Matrix product_of(const Tile& tile) {
        product.resize(std::max<size_t>(product.size(), tile.rows() * tile.columns()));
        return {product.data(), tile.rows(), tile.columns(), tile.columns(), 1};
    }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cut the weight into tiles of similar size, as many for each thread as for the others unless they got too small.
inline std::vector<Tile> tiles(int64_t rows, int64_t columns, int64_t threads) {
    int64_t down = ceil_div(rows, kTileRows), across = ceil_div(columns, kTileColumns);
    const auto even_down = [&] {
        const int64_t step = threads / std::gcd(threads, across);
        return ceil_div(down, step) * step;
    };
    // where there are too few rows for all threads, columns are shared out too
    while (rows < even_down() * kSmallestTile && across % threads != 0 && columns > across * kSmallestTile) ++across;
    if (rows >= even_down() * kSmallestTile) down = even_down();

    std::vector<Tile> result;
    for (int64_t i = 0; i < down; ++i) {
        for (int64_t j = 0; j < across; ++j) {
            result.push_back(
                {rows * i / down, rows * (i + 1) / down, columns * j / across, columns * (j + 1) / across});
        }
    }
    return result;
}

}  // namespace sparseft
