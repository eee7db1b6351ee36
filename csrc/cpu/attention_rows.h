// Rows of attention's scores on the CPU: one key and kRowQueries queries, side by side, so that what softmax sums and
// compares for a query lies one below the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "outer_product.h"
#include "simd.h"

namespace sparseft {

inline constexpr int64_t kRowQueries = kBlockColumns;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One number for each of these queries. An array of rows is a panel of x, see outer_product.h.
struct alignas(64) Row {
    float of[kRowQueries];

    float& operator[](int64_t query) { return of[query]; }
    float operator[](int64_t query) const { return of[query]; }
};

// e**x to two units in the last place; 0 where that is below 1.6e-38.
inline float exponential(float x) {
    constexpr float kSmallest = -87, kRound = 12582912;  // 1.5 * 2**23: added, it moves an integer to the lowest bits
    constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
    const float bounded = std::max(x, kSmallest);
    const float moved = bounded * 1.44269504f + kRound;
    const float power = moved - kRound;
    const float rest = (bounded - power * kLog2High) - power * kLog2Low;  // at most log(2) / 2
    float sum = 1.98756915e-4f;
    sum = sum * rest + 1.39819995e-3f;
    sum = sum * rest + 8.33345191e-3f;
    sum = sum * rest + 4.16657959e-2f;
    sum = sum * rest + 1.66666655e-1f;
    sum = sum * rest + 5.00000012e-1f;
    sum = sum * rest * rest + rest + 1;
    int32_t bits;
    std::memcpy(&bits, &moved, sizeof(bits));
    bits = (bits + 127) << 23;  // 2**power: the rest of the integer is shifted out
    float scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    return x < kSmallest ? 0 : sum * scale;
}

// Add to the scores of the first `queries` what lies at their place in `bias`, with strides of its own.
SPARSEFT_SIMD inline void add_bias(Row* __restrict scores, int64_t keys, int64_t queries, const float* bias,
                                   int64_t key_stride, int64_t query_stride) {
    for (int64_t key = 0; key < keys; ++key) {
        for (int64_t query = 0; query < queries; ++query) {
            scores[key][query] += bias[key * key_stride + query * query_stride];
        }
    }
}

// Hide each key from the queries before it. `first`: which query the rows begin with.
inline void hide_later_keys(Row* scores, int64_t keys, int64_t first) {
    for (int64_t key = first + 1; key < keys; ++key) {
        std::fill_n(scores[key].of, std::min(kRowQueries, key - first), -kInfinity);
    }
}

// Replace scores by exp(score - largest), and return the largest of each query and its sum. Queries that see no key,
// all of whose scores are -infinity, get zeros.
SPARSEFT_SIMD inline void exponentials(Row* __restrict scores, int64_t keys, Row& largest, Row& sum) {
    Row most, total = {};
    std::fill_n(most.of, kRowQueries, -kInfinity);
    for (int64_t key = 0; key < keys; ++key) {
        for (int64_t i = 0; i < kRowQueries; ++i) most[i] = scores[key][i] > most[i] ? scores[key][i] : most[i];
    }
    for (int64_t i = 0; i < kRowQueries; ++i) most[i] = most[i] == -kInfinity ? 0 : most[i];
    for (int64_t key = 0; key < keys; ++key) {
        for (int64_t i = 0; i < kRowQueries; ++i) {
            scores[key][i] = exponential(scores[key][i] - most[i]);
            total[i] += scores[key][i];
        }
    }
    largest = most;
    sum = total;
}

// Replace scores by probabilities, exp(score - log_sum), and gradients of probabilities by those of scores.
SPARSEFT_SIMD inline void softmax_backward(Row* __restrict scores, Row* __restrict gradients, int64_t keys,
                                           const Row& log_sum) {
    const Row logs = log_sum;
    Row mean = {};
    for (int64_t key = 0; key < keys; ++key) {
        for (int64_t i = 0; i < kRowQueries; ++i) {
            scores[key][i] = exponential(scores[key][i] - logs[i]);
            mean[i] += scores[key][i] * gradients[key][i];
        }
    }
    for (int64_t key = 0; key < keys; ++key) {
        for (int64_t i = 0; i < kRowQueries; ++i) gradients[key][i] = scores[key][i] * (gradients[key][i] - mean[i]);
    }
}

SPARSEFT_SIMD inline void multiply_rows(Row* __restrict rows, int64_t count, const Row& factor) {
    const Row factors = factor;
    for (int64_t row = 0; row < count; ++row) {
        for (int64_t i = 0; i < kRowQueries; ++i) rows[row][i] *= factors[i];
    }
}

}  // namespace sparseft
