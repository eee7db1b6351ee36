// Transposes a matrix of fp32 numbers whose rows have no gaps.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparseft {

#ifdef __clang__
#define SPARSEFT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SPARSEFT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourPlaces{__VA_ARGS__})
#endif

using Four = float __attribute__((vector_size(4 * sizeof(float))));
using FourPlaces = int32_t __attribute__((vector_size(4 * sizeof(int32_t))));

// Four rows of four; by vectors that every machine has, because of a loop over numbers GCC makes none.
inline void transpose_four(const float* from, int64_t stride, float* out, int64_t out_stride) {
    Four in[4];
    for (int64_t i = 0; i < 4; ++i) std::memcpy(&in[i], from + i * stride, sizeof(Four));
    const Four first01 = SPARSEFT_SHUFFLE(in[0], in[1], 0, 4, 1, 5);
    const Four first23 = SPARSEFT_SHUFFLE(in[2], in[3], 0, 4, 1, 5);
    const Four last01 = SPARSEFT_SHUFFLE(in[0], in[1], 2, 6, 3, 7);
    const Four last23 = SPARSEFT_SHUFFLE(in[2], in[3], 2, 6, 3, 7);
    const Four turned[4] = {
        SPARSEFT_SHUFFLE(first01, first23, 0, 1, 4, 5), SPARSEFT_SHUFFLE(first01, first23, 2, 3, 6, 7),
        SPARSEFT_SHUFFLE(last01, last23, 0, 1, 4, 5), SPARSEFT_SHUFFLE(last01, last23, 2, 3, 6, 7)};
    for (int64_t i = 0; i < 4; ++i) std::memcpy(out + i * out_stride, &turned[i], sizeof(Four));
}

#undef SPARSEFT_SHUFFLE

// Write [rows, columns]: out [columns, rows]. Strides are those between the rows of each.
inline void transpose(const float* from, int64_t stride, int64_t rows, int64_t columns, float* out,
                      int64_t out_stride) {
    const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
    for (int64_t i = 0; i < whole_rows; i += 4) {
        for (int64_t j = 0; j < whole_columns; j += 4) {
            transpose_four(from + i * stride + j, stride, out + j * out_stride + i, out_stride);
        }
    }
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) {
            out[j * out_stride + i] = from[i * stride + j];
        }
    }
}

}  // namespace sparseft
