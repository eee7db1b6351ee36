// Scores as unsigned keys that order as the scores do, and the loops over blocks of keys that radix selection needs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"

namespace sparseft {

constexpr int64_t kKeyGroup = 32;  // keys tested at once, in vector registers; blocks of keys are padded to a multiple

// Below every finite score's key, so that padding is never selected.
constexpr uint32_t kPaddingKey = 0;

// The first digit holds sign, exponent and three bits more, so that NaN and infinities have digits of their own.
constexpr int kFirstDigitBits = 12;
constexpr uint32_t kFirstFiniteDigit = 0x008;
constexpr uint32_t kLastFiniteDigit = 0xff7;

inline __attribute__((always_inline)) uint32_t ordered_key(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (bits == 0x80000000u) bits = 0;  // -0.0 and 0.0 are a tie
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

template <class T>
SPARSEFT_SIMD void load_keys(const T* scores, int64_t n, uint32_t* __restrict keys) {
    for (int64_t i = 0; i < n; ++i) keys[i] = ordered_key(static_cast<float>(scores[i]));
}

inline int64_t count_not_finite(const uint32_t* keys, int64_t n) {
    return std::count_if(keys, keys + n, [](uint32_t key) {
        const uint32_t digit = key >> (32 - kFirstDigitBits);
        return digit < kFirstFiniteDigit || digit > kLastFiniteDigit;
    });
}

// Whether no key was counted among the first digits of NaN and infinities.
inline bool all_finite(const std::vector<int64_t>& counts) {
    const auto is_zero = [](int64_t count) { return count == 0; };
    return std::all_of(counts.begin(), counts.begin() + kFirstFiniteDigit, is_zero) &&
           std::all_of(counts.begin() + kLastFiniteDigit + 1, counts.end(), is_zero);
}

// Count every key's first digit. Neighbours use different counters: scores in a run share their digit, and an
// increment that has to wait for the one before it costs several times as much.
inline void count_first_digits(const uint32_t* keys, int64_t n, uint32_t* even, uint32_t* odd) {
    int64_t i = 0;
    for (; i + 1 < n; i += 2) {
        ++even[keys[i] >> (32 - kFirstDigitBits)];
        ++odd[keys[i + 1] >> (32 - kFirstDigitBits)];
    }
    if (i < n) ++even[keys[i] >> (32 - kFirstDigitBits)];
}

// Count the `bits` bits from `shift` up of the keys whose bits above those are `prefix`.
inline SPARSEFT_SIMD void count_digits(const uint32_t* keys, int64_t n, int shift, int bits, uint32_t prefix,
                                       uint32_t* counts) {
    const int above = shift + bits;
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t group = 0; group < n; group += kKeyGroup) {
        uint32_t any = 0;
        for (int64_t i = group; i < group + kKeyGroup; ++i) any |= (keys[i] >> above) == prefix;
        if (!any) continue;
        for (int64_t i = group; i < group + kKeyGroup; ++i) {
            if ((keys[i] >> above) == prefix) ++counts[(keys[i] >> shift) & mask];
        }
    }
}

inline SPARSEFT_SIMD void count_selected(const uint32_t* keys, int64_t n, uint32_t bar, int64_t& above,
                                         int64_t& ties) {
    uint32_t above_here = 0, ties_here = 0;
    for (int64_t i = 0; i < n; ++i) {
        above_here += keys[i] > bar;
        ties_here += keys[i] == bar;
    }
    above += above_here;
    ties += ties_here;
}

// Write `first` + the position of every key above `bar`, and of the next `ties` keys equal to it, which are counted
// down. Returns how many. `out` must have room for n + 1.
template <class Index>
SPARSEFT_SIMD int64_t pick_selected(const uint32_t* keys, int64_t n, int64_t first, uint32_t bar, int64_t& ties,
                                    Index* __restrict out) {
    int64_t picked = 0;
    for (int64_t group = 0; group < n; group += kKeyGroup) {
        uint32_t any = 0;
        for (int64_t i = group; i < group + kKeyGroup; ++i) any |= keys[i] >= bar;
        if (!any) continue;
        for (int64_t i = group; i < group + kKeyGroup; ++i) {
            const bool tie = keys[i] == bar && ties > 0;
            out[picked] = static_cast<Index>(first + i);
            picked += keys[i] > bar || tie;
            ties -= tie;
        }
    }
    return picked;
}

}  // namespace sparseft
