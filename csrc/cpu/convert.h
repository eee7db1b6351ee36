// Blocks of values between their storage dtype and fp32.
#pragma once

#include <cstdint>
#include <cstring>

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "simd.h"

namespace sparseft {

template <class T>
SPARSEFT_SIMD void widen(const T* values, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(values[i]);
}

template <class T>
SPARSEFT_SIMD void narrow(const float* values, int64_t n, T* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(values[i]);
}

inline void widen(torch::headeronly::ScalarType dtype, const void* values, int64_t n, float* out) {
    using torch::headeronly::ScalarType;
    if (dtype == ScalarType::BFloat16) return widen(static_cast<const torch::headeronly::BFloat16*>(values), n, out);
    if (dtype == ScalarType::Half) return widen(static_cast<const torch::headeronly::Half*>(values), n, out);
    std::memcpy(out, values, n * sizeof(float));
}

inline void narrow(torch::headeronly::ScalarType dtype, const float* values, int64_t n, void* out) {
    using torch::headeronly::ScalarType;
    if (dtype == ScalarType::BFloat16) return narrow(values, n, static_cast<torch::headeronly::BFloat16*>(out));
    if (dtype == ScalarType::Half) return narrow(values, n, static_cast<torch::headeronly::Half*>(out));
    std::memcpy(out, values, n * sizeof(float));
}

}  // namespace sparseft
