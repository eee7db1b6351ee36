// Products of two matrices at chosen entries only, on the CPU: out[n, j] += sum_t left[n, t, a_j] * right[n, t, b_j].
//
// An entry is a dot product over tokens, and tokens lie far apart. So both sides are transposed, block by block of
// tokens: the right side into memory that all threads share, of which one block at a time stays in a second-level
// cache; the left side some rows at a time into a buffer of the thread, just before the entries in these rows are
// multiplied. Every entry belongs to one thread, which adds its blocks in order: results do not depend on how many
// threads there are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check_indices.h"
#include "positions.h"
#include "simd.h"
#include "transpose.h"

namespace sparseft {

inline constexpr int64_t kFeatures = 64;            // transposed at a time: four lines of the cache a token
inline constexpr int64_t kMostTokens = 128;         // of a block: kFeatures of them stay in a first-level cache
inline constexpr int64_t kFewestTokens = 64;        // below which summing over lanes costs more than multiplying
inline constexpr int64_t kBlockFloats = 1 << 17;    // of a block of the right side: half of a second-level cache
inline constexpr int64_t kScratchFloats = 1 << 20;  // of the blocks transposed between two synchronisations
inline constexpr int64_t kBatch = 16;               // entries whose lanes are summed together
inline constexpr int64_t kPieceEntries = 4096;      // the most that threads cannot share
inline constexpr int64_t kShare = 1 << 16;  // numbers transposed or multiplied, below which a second thread costs more

// Some tokens of one sample.
struct TokenBlock {
    int64_t sample, first, tokens;
    int64_t start;  // where they begin among those of all blocks that are transposed together

    int64_t padded() const { return round_up(tokens, kLanes); }
};

// [samples, tokens, features].
struct Samples {
    Matrix first;
    int64_t stride;

    // Features begin..end of some tokens.
    Matrix at(const TokenBlock& block, int64_t begin, int64_t end) const {
        const char* const data = first.at(block.first, begin) + block.sample * stride * first.element_size;
        return {data,       block.tokens, end - begin, first.row_stride, first.column_stride, first.element_size,
                first.dtype};
    }
};

// One entry: its row, of those transposed together, and its column, of all.
struct Entry {
    int32_t row, column;
};

// Add to `out` what the lanes of each entry sum up to. sums: [kBatch, kLanes], of which `count` entries count. Side by
// side, because a single sum over lanes is a chain of small steps.
SPARSEFT_SIMD inline void add_sums(const float* __restrict sums, int64_t count, float* __restrict out) {
    float eight[kBatch * 8], four[kBatch * 4], total[kBatch];
    for (int64_t e = 0; e < kBatch; ++e) {
        for (int64_t i = 0; i < 8; ++i) eight[e * 8 + i] = sums[e * kLanes + i] + sums[e * kLanes + i + 8];
    }
    for (int64_t e = 0; e < kBatch; ++e) {
        for (int64_t i = 0; i < 4; ++i) four[e * 4 + i] = eight[e * 8 + i] + eight[e * 8 + i + 4];
    }
    for (int64_t e = 0; e < kBatch; ++e) {
        total[e] = (four[e * 4] + four[e * 4 + 2]) + (four[e * 4 + 1] + four[e * 4 + 3]);
    }
    for (int64_t e = 0; e < count; ++e) out[e] += total[e];
}

// Add the entries' dot products of rows of `left` and columns of `right`, both of `length` tokens, to `out`.
SPARSEFT_SIMD inline void add_dots(const float* __restrict left, const float* __restrict right, const Entry* entries,
                                   int64_t count, int64_t length, float* __restrict out) {
    alignas(64) float sums[kBatch * kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
        const float* const row = left + entries[i].row * length;
        const float* const column = right + entries[i].column * length;
        float lanes[kLanes] = {};
#pragma GCC unroll 4
        for (int64_t t = 0; t < length; t += kLanes) {
            for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += row[t + lane] * column[t + lane];
        }
        std::copy(lanes, lanes + kLanes, sums + i % kBatch * kLanes);
        if (i % kBatch == kBatch - 1) add_sums(sums, kBatch, out + i + 1 - kBatch);
    }
    add_sums(sums, count % kBatch, out + count - count % kBatch);
}

// Entries begin..end, all of them in the kFeatures rows from `row` on.
struct EntryPiece {
    int64_t row, begin, end;
};

// The chosen entries of a matrix, by pieces, and which of its columns they need.
class Entries {
  public:
    // at: in a matrix of `columns` columns.
    Entries(const Selection& at, int64_t columns)
        : entries_(at.k), needed_(ceil_div(columns, kFeatures), 0), costs_{0} {
        int64_t row = 0;
        for_each_position(at, 0, at.k, [&](int64_t j, int64_t position) {
            if (position - row * columns >= columns) row = position / columns;
            add(j, row, position - row * columns);
        });
    }

    int64_t size() const { return static_cast<int64_t>(entries_.size()); }
    const Entry* data() const { return entries_.data(); }
    const EntryPiece& piece(int64_t i) const { return pieces_[i]; }
    bool need_columns_from(int64_t first) const { return needed_[first / kFeatures]; }

    // How many numbers are transposed and multiplied for each token.
    int64_t cost() const { return costs_.back(); }

    // The first piece of part `part` of `parts` that cost about the same.
    int64_t first_piece(int64_t part, int64_t parts) const {
        return std::lower_bound(costs_.begin(), costs_.end(), cost() * part / parts) - costs_.begin();
    }

  private:
    void add(int64_t j, int64_t row, int64_t column) {
        const int64_t first_row = row / kFeatures * kFeatures;
        if (pieces_.empty() || pieces_.back().row != first_row || j - pieces_.back().begin == kPieceEntries) {
            pieces_.push_back({first_row, j, j});
            costs_.push_back(cost() + kFeatures);
        }
        ++pieces_.back().end;
        ++costs_.back();
        entries_[j] = {static_cast<int32_t>(row - first_row), static_cast<int32_t>(column)};
        needed_[column / kFeatures] = 1;
    }

    std::vector<Entry> entries_;
    std::vector<EntryPiece> pieces_;
    std::vector<char> needed_;    // of each kFeatures columns
    std::vector<int64_t> costs_;  // of the pieces before each, and of all
};

class SampledProduct {
  public:
    // out: [samples, k], without gaps.
    SampledProduct(const Samples& left, const Samples& right, const Entries& entries, float* out)
        : left_(left), right_(right), entries_(entries), out_(out), width_(round_up(right.first.columns, kLanes)) {}

    void add(int64_t samples, int64_t tokens) const {
        const int64_t fitting = kBlockFloats / width_ / kLanes * kLanes;
        const int64_t most = std::max(kFewestTokens, std::min(kMostTokens, fitting));
        const int64_t all = samples * round_up(tokens, kLanes);
        const AlignedFloats scratch(width_ * std::min(all, std::max(most, kScratchFloats / width_)));
        std::vector<TokenBlock> blocks;
        int64_t start = 0;
        for (int64_t sample = 0; sample < samples; ++sample) {
            for (int64_t first = 0; first < tokens; first += most) {
                blocks.push_back({sample, first, std::min(most, tokens - first), start});
                start += blocks.back().padded();
                if ((start + most) * width_ <= kScratchFloats) continue;
                add_blocks(blocks, start, scratch.data());
                blocks.clear();
                start = 0;
            }
        }
        if (start > 0) add_blocks(blocks, start, scratch.data());
    }

  private:
    // tokens: of all blocks, with what fills them up; transposed: [width_, its tokens] for each block.
    void add_blocks(const std::vector<TokenBlock>& blocks, int64_t tokens, float* transposed) const {
        const int64_t groups = ceil_div(width_, kFeatures), items = groups * static_cast<int64_t>(blocks.size());
        const int64_t grain = std::max<int64_t>(1, kShare * items / (tokens * width_));
        torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) {
                const TokenBlock& block = blocks[item / groups];
                const int64_t first = item % groups * kFeatures;
                const int64_t last = std::min(first + kFeatures, right_.first.columns);
                float* const out = transposed + block.start * width_ + first * block.padded();
                if (entries_.need_columns_from(first)) transpose(right_.at(block, first, last), out);
            }
        });
        const int64_t shares = std::max<int64_t>(1, tokens * entries_.cost() / kShare);
        const int64_t parts = std::min<int64_t>(torch::stable::get_num_threads(), shares);
        torch::stable::parallel_for(0, parts, 1, [&](int64_t first_part, int64_t last_part) {
            const AlignedFloats rows(kFeatures * kMostTokens);
            const int64_t begin = entries_.first_piece(first_part, parts);
            const int64_t end = entries_.first_piece(last_part, parts);
            for (const TokenBlock& block : blocks) {
                for (int64_t i = begin; i < end; ++i) {
                    add_piece(block, entries_.piece(i), transposed + block.start * width_, rows.data());
                }
            }
        });
    }

    void add_piece(const TokenBlock& block, const EntryPiece& piece, const float* transposed, float* rows) const {
        transpose(left_.at(block, piece.row, std::min(piece.row + kFeatures, left_.first.columns)), rows);
        add_dots(rows, transposed, entries_.data() + piece.begin, piece.end - piece.begin, block.padded(),
                 out_ + block.sample * entries_.size() + piece.begin);
    }

    const Samples left_;
    const Samples right_;
    const Entries& entries_;
    float* out_;
    int64_t width_;
};

// Check the index list of an op that works on one matrix of `numel` entries.
inline Selection matrix_entries(const char* op, const Tensor& indices, int64_t numel, const Place& place) {
    const Argument argument{op, "indices"};
    const Selection at = select(argument, indices, numel, place);
    check(indices.dim() == 1, argument, " must be one list, got ", indices.dim(), " dimensions");
    struct Matrix {
        Selection at;
    };
    if (at.k > 0) check_indices(op, "the matrix", std::vector<Matrix>{{at}});
    return at;
}

}  // namespace sparseft
