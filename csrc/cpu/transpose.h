// Transposes blocks of a matrix that lies token after token, on the CPU, so that the tokens of a feature lie together.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "simd.h"

namespace sparseft {

inline constexpr int64_t kLanes = 16;  // fp32 numbers in a line of the cache, and in the widest vector register

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Memory, not set to anything, that begins with a line of the cache: vectors that straddle two lines load slowly.
class AlignedFloats {
  public:
    explicit AlignedFloats(int64_t n) : memory_(new float[n + kLanes]) {}

    float* data() const {
        const intptr_t address = reinterpret_cast<intptr_t>(memory_.get());
        return reinterpret_cast<float*>(round_up(address, kLanes * sizeof(float)));
    }

  private:
    std::unique_ptr<float[]> memory_;
};

// [samples, tokens, features] of fp32, bf16 or fp16, with any strides.
struct Factor {
    const char* data;
    torch::headeronly::ScalarType dtype;
    int64_t features, element_size, sample_stride, token_stride, feature_stride;

    const char* at(int64_t sample, int64_t token, int64_t feature) const {
        return data + (sample * sample_stride + token * token_stride + feature * feature_stride) * element_size;
    }
};

// Some tokens of one sample.
struct TokenBlock {
    int64_t sample, first, tokens;
    int64_t start;  // where they begin among those of all blocks that are transposed together

    int64_t padded() const { return round_up(tokens, kLanes); }
};

// kLanes tokens of kLanes features as fp32, with zeros where there are fewer.
template <class T>
SPARSEFT_SIMD void read_square(const T* from, int64_t token_stride, int64_t feature_stride, int64_t tokens,
                               int64_t features, float* __restrict square) {
    for (int64_t t = 0; t < tokens; ++t) {
        float* const row = square + t * kLanes;
        if (features == kLanes && feature_stride == 1) {
            for (int64_t f = 0; f < kLanes; ++f) row[f] = static_cast<float>(from[t * token_stride + f]);
        } else {
            for (int64_t f = 0; f < features; ++f) {
                row[f] = static_cast<float>(from[t * token_stride + f * feature_stride]);
            }
            std::fill(row + features, row + kLanes, 0.0f);
        }
    }
    std::fill(square + tokens * kLanes, square + kLanes * kLanes, 0.0f);
}

SPARSEFT_SIMD inline void transpose_square(const float* __restrict from, int64_t stride, float* __restrict out,
                                           int64_t out_stride) {
    for (int64_t f = 0; f < kLanes; ++f) {
        for (int64_t t = 0; t < kLanes; ++t) out[f * out_stride + t] = from[t * stride + f];
    }
}

// Write features begin..end of a block as fp32: out [end - begin, padded tokens], where both are filled up with zeros
// to whole squares.
inline void transpose(const Factor& factor, const TokenBlock& block, int64_t begin, int64_t end, float* out) {
    using torch::headeronly::ScalarType;
    alignas(64) std::array<float, kLanes * kLanes> square;
    const int64_t length = block.padded();
    for (int64_t t = 0; t < block.tokens; t += kLanes) {
        for (int64_t f = begin; f < end; f += kLanes) {
            const char* const from = factor.at(block.sample, block.first + t, f);
            const int64_t tokens = std::min(kLanes, block.tokens - t), features = std::min(kLanes, end - f);
            float* const to = out + (f - begin) * length + t;
            const auto read = [&](const auto* values) {
                read_square(values, factor.token_stride, factor.feature_stride, tokens, features, square.data());
            };
            if (factor.dtype == ScalarType::BFloat16) {
                read(reinterpret_cast<const torch::headeronly::BFloat16*>(from));
            } else if (factor.dtype == ScalarType::Half) {
                read(reinterpret_cast<const torch::headeronly::Half*>(from));
            } else if (tokens == kLanes && features == kLanes && factor.feature_stride == 1) {
                transpose_square(reinterpret_cast<const float*>(from), factor.token_stride, to, length);
                continue;
            } else {
                read(reinterpret_cast<const float*>(from));
            }
            transpose_square(square.data(), kLanes, to, length);
        }
    }
}

}  // namespace sparseft
