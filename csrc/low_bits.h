// Numbers in fewer bits than fp32, for CPU and CUDA alike: sparseft/low_bits.py says the same in PyTorch, and every
// backend draws the same random bits. They come from a hash of seed, step and position, so that they do not depend on
// who draws them, or in which order.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

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

// Others for a state of the same entry.
SPARSEFT_HOST_DEVICE uint32_t random_of_state(uint32_t random, int state) { return mix(random + 1 + state); }

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

// An optimizer's states in 8 bits an entry, with an fp32 scale for every 256 of them: the largest magnitude. A code is
// the exponent and the first three digits of magnitude / scale + 2^-kOctaves, so that steps are about a tenth of what
// they are steps of down to there, and even below. A first state has a sign, and 15 octaves; a second one is a mean of
// squares, and has 31: what is 2^-15 of the block's largest gradient is still told from 0.
constexpr int64_t kCodeBlock = 256;

SPARSEFT_HOST_DEVICE int64_t code_blocks(int64_t k) { return (k + kCodeBlock - 1) / kCodeBlock; }

template <bool kSquares>
struct Code {
    static constexpr uint32_t kOctaves = kSquares ? 31 : 15, kLargest = kSquares ? 255 : 127;
    static constexpr uint32_t kOffset = (127 - kOctaves) << 23;  // 2^-kOctaves
    static constexpr int kDropped = 20;

    static SPARSEFT_HOST_DEVICE float decode(uint32_t code, float scale) {
        const float magnitude = from_bits(((code & kLargest) << kDropped) + kOffset) - from_bits(kOffset);
        return (!kSquares && code > kLargest ? -magnitude : magnitude) * scale;
    }

    // `scale` is no less than the magnitude. Rounded up with the probability that makes the mean right: a mean of
    // squares moves by a thousandth a step, which rounding to the nearest would never see. One that is not 0 does not
    // become 0: the next step divides by its root.
    static SPARSEFT_HOST_DEVICE uint32_t encode(float value, float scale, uint32_t random) {
        const uint32_t bits = bits_of(value), sign = kSquares ? 0 : bits >> 31 << 7;
        const float magnitude = from_bits(bits & 0x7fffffffu);
        const float share = scale > 0 ? magnitude / scale : 0;
        const uint32_t rounded = bits_of(share + from_bits(kOffset)) + (random & ((1u << kDropped) - 1));
        uint32_t code = (rounded >> kDropped) - (kOffset >> kDropped);
        code = code < kLargest ? code : kLargest;
        if (kSquares && code == 0 && magnitude > 0) code = 1;
        return code | sign;
    }
};

}  // namespace sparseft
