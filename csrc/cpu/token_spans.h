// Inputs of a linear layer on the CPU, and which tokens of a sample its gradient comes from.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "fisher_tiles.h"
#include "panels.h"
#include "simd.h"

namespace sparseft {

using torch::stable::Tensor;

// x or dy: [N, T, features].
struct Input {
    const char* data;
    ScalarType dtype;
    int64_t samples, tokens, features, element_size, sample_stride, token_stride, feature_stride;

    explicit Input(const Tensor& tensor)
        : data(static_cast<const char*>(tensor.data_ptr())),
          dtype(tensor.scalar_type()),
          samples(tensor.size(0)),
          tokens(tensor.size(1)),
          features(tensor.size(2)),
          element_size(tensor.element_size()),
          sample_stride(tensor.stride(0)),
          token_stride(tensor.stride(1)),
          feature_stride(tensor.stride(2)) {}

    const char* at(int64_t sample, int64_t token, int64_t feature) const {
        return data + (sample * sample_stride + token * token_stride + feature * feature_stride) * element_size;
    }

    // Features begin..end of `count` tokens of one sample, [count, end - begin].
    Matrix of_sample(int64_t sample, int64_t first, int64_t count, int64_t begin, int64_t end) const {
        return {at(sample, first, begin), count, end - begin, token_stride, feature_stride, element_size, dtype};
    }

    // Features begin..end of the first token of `count` samples, [count, end - begin].
    Matrix of_samples(int64_t first, int64_t count, int64_t begin, int64_t end) const {
        return {at(first, 0, begin), count, end - begin, sample_stride, feature_stride, element_size, dtype};
    }
};

// Tokens first..end of a sample.
struct Span {
    int64_t first, end;

    int64_t tokens() const { return end - first; }
};

SPARSEFT_SIMD inline bool any_nonzero(const float* values, int64_t n, int64_t stride) {
    bool any = false;
    if (stride == 1) {
        for (int64_t i = 0; i < n; ++i) any |= values[i] != 0;
    } else {
        for (int64_t i = 0; i < n; ++i) any |= values[i * stride] != 0;
    }
    return any;
}

// 16-bit floating point numbers, by their bits: all but the sign are zero in both zeros, and in nothing else.
SPARSEFT_SIMD inline bool any_nonzero(const uint16_t* values, int64_t n, int64_t stride) {
    uint16_t bits = 0;
    if (stride == 1) {
        for (int64_t i = 0; i < n; ++i) bits |= values[i];
    } else {
        for (int64_t i = 0; i < n; ++i) bits |= values[i * stride];
    }
    return bits & 0x7fff;
}

inline bool row_is_zero(const Input& dy, int64_t sample, int64_t token) {
    constexpr int64_t kAtOnce = 512;  // outside of padding the first features decide
    for (int64_t begin = 0; begin < dy.features; begin += kAtOnce) {
        const int64_t n = std::min(kAtOnce, dy.features - begin);
        const void* values = dy.at(sample, token, begin);
        const bool any = dy.dtype == ScalarType::Float
                             ? any_nonzero(static_cast<const float*>(values), n, dy.feature_stride)
                             : any_nonzero(static_cast<const uint16_t*>(values), n, dy.feature_stride);
        if (any) return false;
    }
    return true;
}

// From the first to the last token whose row of dy is not zero, for every sample.
inline std::vector<Span> token_spans(const Input& dy) {
    std::vector<Span> spans(dy.samples);
    const int64_t grain = std::max<int64_t>(1, kSmallestShare / (dy.tokens * dy.features));
    torch::stable::parallel_for(0, dy.samples, grain, [&](int64_t begin, int64_t end) {
        for (int64_t sample = begin; sample < end; ++sample) {
            Span span{0, dy.tokens};
            while (span.first < span.end && row_is_zero(dy, sample, span.first)) ++span.first;
            while (span.first < span.end && row_is_zero(dy, sample, span.end - 1)) --span.end;
            spans[sample] = span;
        }
    });
    return spans;
}

}  // namespace sparseft
