// topk_indices on the CPU: exact radix selection over many tensors, which are never concatenated. What it computes:
// sparseft/reference.py.
//
// Up to three reads of the scores find the k-th largest key, 12, 10 and 10 bits at a time, by counting how many keys
// have each digit. One more counts what each piece contributes, so that the last can write all pieces in parallel.
#include <algorithm>
#include <limits>
#include <mutex>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../checks.h"
#include "radix_keys.h"
#include "work_list.h"

namespace sparseft {
namespace {

constexpr int64_t kPieceScores = 1 << 16;
constexpr int64_t kBlockScores = 1024;  // a block of keys stays in the first-level cache beside the counters

struct Scores {
    const void* data;
    int64_t numel;
    ScalarType dtype;
};

// Selected are the keys above `bar`, and the first `ties` keys, in order of (tensor, index), that equal it.
struct Threshold {
    uint32_t bar;
    int64_t ties;
};

// Keys of some scores that follow each other: n of them, with padding up to a multiple of kKeyGroup, from position
// `first` of a tensor.
struct KeyBlock {
    const uint32_t* keys;
    int64_t n, padded, first;
};

template <class Body>
void for_each_block(const Scores& scores, const Piece& piece, const Body& body) {
    alignas(64) uint32_t keys[kBlockScores];
    for (int64_t first = piece.begin; first < piece.end; first += kBlockScores) {
        const int64_t n = std::min(kBlockScores, piece.end - first);
        if (scores.dtype == ScalarType::Float) {
            load_keys(static_cast<const float*>(scores.data) + first, n, keys);
        } else if (scores.dtype == ScalarType::BFloat16) {
            load_keys(static_cast<const torch::headeronly::BFloat16*>(scores.data) + first, n, keys);
        } else {
            load_keys(static_cast<const torch::headeronly::Half*>(scores.data) + first, n, keys);
        }
        const int64_t padded = (n + kKeyGroup - 1) / kKeyGroup * kKeyGroup;
        std::fill(keys + n, keys + padded, kPaddingKey);
        body(KeyBlock{keys, n, padded, first});
    }
}

// Count the digits of `bits` bits from `shift` up, over all keys that begin with `prefix`.
std::vector<int64_t> digit_counts(const std::vector<Scores>& scores, const WorkList& work, int shift, int bits,
                                  uint32_t prefix) {
    const size_t digits = size_t{1} << bits;
    std::vector<int64_t> totals(digits);
    std::mutex mutex;
    work.parallel(kPieceScores, [&](const auto& for_each_piece) {
        std::vector<uint32_t> counts(2 * digits);
        uint32_t* const even = counts.data();
        uint32_t* const odd = even + digits;
        const auto collect = [&] {
            const std::lock_guard<std::mutex> lock(mutex);
            for (size_t digit = 0; digit < digits; ++digit) totals[digit] += int64_t{even[digit]} + odd[digit];
            std::fill(counts.begin(), counts.end(), 0);
        };
        int64_t seen = 0;
        for_each_piece([&](const Piece& piece) {
            for_each_block(scores[piece.tensor], piece, [&](const KeyBlock& block) {
                if (shift + bits == 32) {
                    count_first_digits(block.keys, block.n, even, odd);
                } else {
                    count_digits(block.keys, block.padded, shift, bits, prefix, even);
                }
            });
            seen += piece.end - piece.begin;
            if (seen < int64_t{1} << 31) return;
            collect();  // before a counter, of 32 bits, can overflow
            seen = 0;
        });
        collect();
    });
    return totals;
}

// Raise an error that names the first tensor with a NaN or an infinity.
[[noreturn]] void fail_not_finite(const std::vector<Scores>& scores) {
    for (size_t i = 0; i < scores.size(); ++i) {
        int64_t bad = 0;
        for_each_block(scores[i], Piece{0, 0, 0, scores[i].numel},
                       [&](const KeyBlock& block) { bad += count_not_finite(block.keys, block.n); });
        const Argument argument{"topk_indices", "scores", static_cast<int64_t>(i)};
        check(bad == 0, argument, " must be finite, got ", bad,
              " NaN or infinite values; drop the samples that caused them");
    }
    fail("topk_indices: scores changed while they were read");
}

Threshold find_threshold(const std::vector<Scores>& scores, const WorkList& work, int64_t k) {
    uint32_t prefix = 0;
    int shift = 32;
    for (const int bits : {kFirstDigitBits, 10, 10}) {
        shift -= bits;
        const std::vector<int64_t> counts = digit_counts(scores, work, shift, bits, prefix);
        if (bits == kFirstDigitBits && !all_finite(counts)) fail_not_finite(scores);
        uint32_t digit = static_cast<uint32_t>(counts.size()) - 1;
        for (; counts[digit] < k; --digit) k -= counts[digit];
        prefix = (prefix << bits) | digit;
        if (counts[digit] == k) return {(prefix << shift) - 1, 0};
    }
    return {prefix, k};
}

// How many entries each piece contributes, and where it writes them.
struct Contribution {
    int64_t above, ties, offset;
};

std::vector<Contribution> contributions(const std::vector<Scores>& scores, const WorkList& work,
                                        const Threshold& threshold) {
    std::vector<Contribution> result(work.pieces());
    work.parallel(kPieceScores, [&](const auto& for_each_piece) {
        for_each_piece([&](const Piece& piece) {
            Contribution here{};
            for_each_block(scores[piece.tensor], piece, [&](const KeyBlock& block) {
                count_selected(block.keys, block.padded, threshold.bar, here.above, here.ties);
            });
            result[piece.id] = here;
        });
    });
    int64_t offset = 0, ties = threshold.ties;
    for (Contribution& piece : result) {
        piece.ties = std::min(piece.ties, ties);
        ties -= piece.ties;
        piece.offset = offset;
        offset += piece.above + piece.ties;
    }
    return result;
}

template <class Index>
void write_indices(const std::vector<Scores>& scores, const WorkList& work, uint32_t bar,
                   const std::vector<Contribution>& contributions, Index* indices) {
    work.parallel(kPieceScores, [&](const auto& for_each_piece) {
        Index picked[kBlockScores + 1];
        for_each_piece([&](const Piece& piece) {
            const Contribution& here = contributions[piece.id];
            if (here.above + here.ties == 0) return;
            Index* out = indices + here.offset;
            int64_t ties = here.ties;
            for_each_block(scores[piece.tensor], piece, [&](const KeyBlock& block) {
                out =
                    std::copy_n(picked, pick_selected(block.keys, block.padded, block.first, bar, ties, picked), out);
            });
        });
    });
}

std::tuple<Tensor, Tensor> topk_indices(const std::vector<Tensor>& tensors, int64_t k) {
    std::vector<Tensor> kept_alive;
    std::vector<Scores> scores;
    int64_t total = 0, longest = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
        const Argument argument{"topk_indices", "scores", static_cast<int64_t>(i)};
        check_dtype(argument, tensors[i], kFloatTypes);
        check_device(argument, tensors[i], tensors[0]);
        kept_alive.push_back(tensors[i].is_contiguous() ? tensors[i] : torch::stable::contiguous(tensors[i]));
        scores.push_back({kept_alive[i].data_ptr(), tensors[i].numel(), tensors[i].scalar_type()});
        total += scores[i].numel;
        longest = std::max(longest, scores[i].numel);
    }
    check(0 <= k && k <= total, Argument{"topk_indices", "k"}, " must be from 0 to the number of scores, ", total,
          ", got ", k);

    const WorkList work(scores.size(), kPieceScores, [&](size_t i) { return scores[i].numel; });
    const Threshold threshold = find_threshold(scores, work, k);
    const std::vector<Contribution> parts = contributions(scores, work, threshold);
    const bool wide = longest > std::numeric_limits<int32_t>::max();
    Tensor indices = torch::stable::new_empty(tensors[0], {k}, wide ? ScalarType::Long : ScalarType::Int);
    if (wide) {
        write_indices(scores, work, threshold.bar, parts, static_cast<int64_t*>(indices.data_ptr()));
    } else {
        write_indices(scores, work, threshold.bar, parts, static_cast<int32_t*>(indices.data_ptr()));
    }

    Tensor counts = torch::stable::new_zeros(tensors[0], {static_cast<int64_t>(tensors.size())}, ScalarType::Long);
    int64_t* const count = static_cast<int64_t*>(counts.data_ptr());
    work.for_each(0, work.pieces(),
                  [&](const Piece& piece) { count[piece.tensor] += parts[piece.id].above + parts[piece.id].ties; });
    return {indices, counts};
}

}  // namespace
}  // namespace sparseft

STABLE_TORCH_LIBRARY_IMPL(sparseft, CPU, m) { m.impl("topk_indices", TORCH_BOX(&sparseft::topk_indices)); }
