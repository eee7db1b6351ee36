// Blocks of dy^T x, whose sums over tokens never leave the registers before they are squared.
//
// Both operands lie token after token, so one token of a panel of dy and one of a panel of x, see panels.h, are an
// outer product of two short vectors. A block of the weight's gradient is the sum of these over tokens. Its entries
// are added in the order of the tokens, whatever the vector unit.
#pragma once

#include <cstdint>

namespace sparseft {

inline constexpr int64_t kBlockRows = 6;      // features of dy: twelve sums and two of x fit into sixteen registers
inline constexpr int64_t kBlockColumns = 32;  // features of x: two of the widest vectors

struct OuterProduct {
    // dy: [tokens, kBlockRows]; x: [tokens, kBlockColumns]; out: kBlockRows rows that lie `stride` apart.
    using Add = void(const float* dy, const float* x, int64_t tokens, float weight, float* out, int64_t stride);

    const char* vector_unit;
    Add* add;          // out += weight * dy^T x
    Add* add_squares;  // out += weight * (dy^T x)**2
};

// For the widest vectors of this machine. ATEN_CPU_CAPABILITY, which holds torch's own kernels back, is obeyed: it may
// be avx2 or default.
const OuterProduct& outer_product();

}  // namespace sparseft
