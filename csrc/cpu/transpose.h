// Transposes a matrix that lies token after token, on the CPU, so that the tokens of a feature lie together.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "panels.h"
#include "simd.h"
#include "transpose_floats.h"

namespace sparseft {

inline constexpr int64_t kLanes = 16;  // fp32 numbers in a line of the cache, and in the widest vector register
inline constexpr int64_t kLineBytes = kLanes * sizeof(float);

// Memory, not set to anything, that begins with a line of the cache: vectors that straddle two lines load slowly.
class AlignedFloats {
  public:
    explicit AlignedFloats(int64_t n) : memory_(new float[n + kLanes]) {}

    float* data() const {
        const intptr_t address = reinterpret_cast<intptr_t>(memory_.get());
        return reinterpret_cast<float*>(round_up(address, kLineBytes));
    }

  private:
    std::unique_ptr<float[]> memory_;
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

// Write a matrix [tokens, features] as fp32: out [features, tokens], where both are filled up with zeros to whole
// squares.
inline void transpose(const Matrix& source, float* out) {
    alignas(64) std::array<float, kLanes * kLanes> square;
    const int64_t length = round_up(source.rows, kLanes);
    for (int64_t t = 0; t < source.rows; t += kLanes) {
        // tokens lie far apart: the processor would not foresee the next ones
        for (int64_t next = t + kLanes; next < std::min(t + 2 * kLanes, source.rows); ++next) {
            for (int64_t f = 0; f < source.columns; f += kLineBytes / source.element_size) {
                __builtin_prefetch(source.at(next, f));
            }
        }
        for (int64_t f = 0; f < source.columns; f += kLanes) {
            const int64_t tokens = std::min(kLanes, source.rows - t), features = std::min(kLanes, source.columns - f);
            const void* const from = source.at(t, f);
            float* const to = out + f * length + t;
            const auto read = [&](const auto* values) {
                read_square(values, source.row_stride, source.column_stride, tokens, features, square.data());
            };
            if (source.dtype == ScalarType::BFloat16) {
                read(static_cast<const torch::headeronly::BFloat16*>(from));
            } else if (source.dtype == ScalarType::Half) {
                read(static_cast<const torch::headeronly::Half*>(from));
            } else if (tokens == kLanes && features == kLanes && source.column_stride == 1) {
                transpose(static_cast<const float*>(from), source.row_stride, kLanes, kLanes, to, length);
                continue;
            } else {
                read(static_cast<const float*>(from));
            }
            transpose(square.data(), kLanes, kLanes, kLanes, to, length);
        }
    }
}

}  // namespace sparseft
