// Numbers in fewer bits than fp32, for CPU and CUDA alike: sparseft/low_bits.py says the same in PyTorch, and every
// backend draws the same random bits. They come from a hash of seed, step and position, so that they do not depend on
// who draws them, or in which order.
#pragma once

#include <cstdint>
#include <cstring>

#include "update_rules.h"

namespace sparseft {

SPARSEFT_HOST_DEVICE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

SPARSEFT_HOST_DEVICE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A bijection of 32 bits in which every bit of the input changes every bit of the output half of the time; constants
// from Wellons' search for such functions ("lowbias32").
SPARSEFT_HOST_DEVICE uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

SPARSEFT_HOST_DEVICE uint32_t mixed_seed(int64_t seed) {
    return mix(static_cast<uint32_t>(seed) ^ mix(static_cast<uint32_t>(seed >> 32)));
}

SPARSEFT_HOST_DEVICE uint32_t random_key(uint32_t mixed_seed, float step) {
    return mix(mixed_seed ^ static_cast<uint32_t>(step));
}

SPARSEFT_HOST_DEVICE uint32_t random_bits(uint32_t key, int64_t position) {
    return mix(mix(static_cast<uint32_t>(position) ^ key) + (static_cast<uint32_t>(position >> 32) ^ key));
}

// Round to a neighbour among the bf16 numbers, up with the probability that makes the mean right.
SPARSEFT_HOST_DEVICE float round_to_bfloat16(float value, uint32_t random) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + (random & 0xffffu)) & 0xffff0000u;
    return (bits & 0x7f800000u) == 0x7f800000u ? value : from_bits(rounded);
}

// The same among the fp16 numbers. Below the normal ones their spacing stays that from 2^-14 on, where the magnitude
// is moved to be rounded.
SPARSEFT_HOST_DEVICE float round_to_half(float value, uint32_t random) {
    constexpr float kSmallest = 6.103515625e-05f;
    const uint32_t bits = bits_of(value), sign = bits & 0x80000000u;
    const float magnitude = from_bits(bits ^ sign);
    const float moved_by = magnitude < kSmallest ? kSmallest : 0;
    const float rounded = from_bits((bits_of(magnitude + moved_by) + (random & 0x1fffu)) & 0xffffe000u) - moved_by;
    return (bits & 0x7f800000u) == 0x7f800000u ? value : from_bits(bits_of(rounded) | sign);
}

}  // namespace sparseft
