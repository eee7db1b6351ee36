// The loops over blocks of what ../low_bits.h says of one number.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../low_bits.h"
#include "simd.h"

namespace sparseft {

// Fill `random` with the random bits of n positions.
inline SPARSEFT_SIMD void fill_random(const int64_t* __restrict positions, int64_t n, uint32_t key,
                                      uint32_t* __restrict random) {
    for (int64_t i = 0; i < n; ++i) random[i] = random_bits(key, positions[i]);
}

inline SPARSEFT_SIMD void round_to_bfloat16(const uint32_t* __restrict random, int64_t n, float* __restrict values) {
    for (int64_t i = 0; i < n; ++i) values[i] = round_to_bfloat16(values[i], random[i]);
}

inline SPARSEFT_SIMD void round_to_half(const uint32_t* __restrict random, int64_t n, float* __restrict values) {
    for (int64_t i = 0; i < n; ++i) values[i] = round_to_half(values[i], random[i]);
}

template <bool kSquares>
SPARSEFT_SIMD void decode(const uint8_t* __restrict codes, float scale, int64_t n, float* __restrict values) {
    for (int64_t i = 0; i < n; ++i) values[i] = Code<kSquares>::decode(codes[i], scale);
}

// Return the largest magnitude, or NaN if there is one.
inline SPARSEFT_SIMD float largest_magnitude(const float* values, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, bits_of(values[i]) & 0x7fffffffu);
    return from_bits(largest);
}

template <bool kSquares>
SPARSEFT_SIMD void encode(const float* __restrict values, float scale, const uint32_t* __restrict random, int64_t n,
                          uint8_t* __restrict codes) {
    for (int64_t i = 0; i < n; ++i) {
        codes[i] =
            static_cast<uint8_t>(Code<kSquares>::encode(values[i], scale, random_of_state(random[i], kSquares)));
    }
}

}  // namespace sparseft
