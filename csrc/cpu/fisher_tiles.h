// Tiles of a Fisher diagonal on the CPU, to which the squares of products of dy and x are added.
//
// A tile of the weight stays in the second-level cache while samples pass by: one sample's columns of dy and x are
// packed into panels, and the squares of their product are added to the Fisher diagonal block by block. Threads share
// tiles, which consist of whole blocks: so an entry's sum does not depend on how the weight is cut.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "ahead.h"
#include "outer_product.h"
#include "panels.h"

namespace sparseft {

inline constexpr int64_t kTileRows = 42;  // in blocks, as below: a tile and the panels of 128 tokens fill 1 MiB
inline constexpr int64_t kTileColumns = 16;
inline constexpr int64_t kFewestRows = 4;        // below, packing x costs more than a tile's rows make of it
inline constexpr int64_t kMostPacked = 1 << 21;  // floats of dy or x, where samples are so long that this cuts tiles
// multiplications, below which a second thread costs more than it saves
inline constexpr int64_t kSmallestShare = 1 << 20;

struct Tile {
    int64_t row_begin, row_end, column_begin, column_end;

    int64_t rows() const { return row_end - row_begin; }
    int64_t columns() const { return column_end - column_begin; }
};

// Cut the weight into tiles of similar size, as many for each thread as for the others unless they got too small.
// `tokens`: of the longest sample.
inline std::vector<Tile> tiles(int64_t rows, int64_t columns, int64_t tokens, int64_t threads) {
    const int64_t row_blocks = ceil_div(rows, kBlockRows), column_blocks = ceil_div(columns, kBlockColumns);
    const int64_t most_rows = std::clamp<int64_t>(kMostPacked / (tokens * kBlockRows), 1, kTileRows);
    const int64_t most_columns = std::clamp<int64_t>(kMostPacked / (tokens * kBlockColumns), 1, kTileColumns);
    int64_t down = ceil_div(row_blocks, most_rows), across = ceil_div(column_blocks, most_columns);
    const auto even_down = [&] {
        const int64_t step = threads / std::gcd(threads, across);
        return ceil_div(down, step) * step;
    };
    // where there are too few rows for all threads, columns are shared out too
    while (row_blocks < even_down() * kFewestRows && across % threads != 0 && across < column_blocks) ++across;
    if (row_blocks >= even_down() * kFewestRows) down = even_down();

    std::vector<Tile> result;
    for (int64_t i = 0; i < down; ++i) {
        for (int64_t j = 0; j < across; ++j) {
            result.push_back({row_blocks * i / down * kBlockRows,
                              std::min(rows, row_blocks * (i + 1) / down * kBlockRows),
                              column_blocks * j / across * kBlockColumns,
                              std::min(columns, column_blocks * (j + 1) / across * kBlockColumns)});
        }
    }
    return result;
}

// A tile's columns of dy and x. Every thread has its own.
struct Packed {
    Panels<kBlockRows> dy;
    Panels<kBlockColumns> x;
    Ahead ahead;  // the next sample's

    int64_t tokens() const { return dy.rows(); }
};

struct Block {
    const float *dy, *x;
    int64_t row, column;    // of the weight
    int64_t rows, columns;  // fewer than kBlockRows and kBlockColumns at the edges of the weight

    bool whole() const { return rows == kBlockRows && columns == kBlockColumns; }
};

// Call `visit(block)` for each block of a tile.
template <class Visit>
void for_each_block(const Tile& tile, Packed& packed, const Visit& visit) {
    for (int64_t j = 0; j < packed.x.count(); ++j) {
        const int64_t column = tile.column_begin + j * kBlockColumns;
        for (int64_t i = 0; i < packed.dy.count(); ++i) {
            const int64_t row = tile.row_begin + i * kBlockRows;
            packed.ahead.step();
            visit(Block{packed.dy[i], packed.x[j], row, column, std::min(kBlockRows, tile.row_end - row),
                        std::min(kBlockColumns, tile.column_end - column)});
        }
    }
}

inline void prefetch_block(const float* first, int64_t stride) {
    for (int64_t i = 0; i < kBlockRows; ++i) {
        __builtin_prefetch(first + i * stride, 1);
        __builtin_prefetch(first + i * stride + kBlockColumns / 2, 1);
    }
}

// Add what `add` makes of the product of packed dy and x to a tile of `out`, whose rows lie `stride` apart.
inline void add_tile(const Tile& tile, Packed& packed, OuterProduct::Add* add, float weight, float* out,
                     int64_t stride) {
    for_each_block(tile, packed, [&](const Block& block) {
        float* const first = out + block.row * stride + block.column;
        if (block.row + 2 * kBlockRows <= tile.row_end) prefetch_block(first + kBlockRows * stride, stride);
        if (block.whole()) return add(block.dy, block.x, packed.tokens(), weight, first, stride);
        float edge[kBlockRows][kBlockColumns] = {};
        for (int64_t i = 0; i < block.rows; ++i) std::copy_n(first + i * stride, block.columns, edge[i]);
        add(block.dy, block.x, packed.tokens(), weight, edge[0], kBlockColumns);
        for (int64_t i = 0; i < block.rows; ++i) std::copy_n(edge[i], block.columns, first + i * stride);
    });
}

}  // namespace sparseft
