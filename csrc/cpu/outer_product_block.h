// The block of outer_product.h for one vector unit. Included once for each, inside a namespace of its own: a vector
// wider than what a function is compiled for gets cut into pieces before anything is inlined, so no template can be
// shared.
//
// SPARSEFT_TARGET: attribute that names the unit; SPARSEFT_LANES: floats of a vector. Both end with this file.

// Not aligned: GCC heeds what is said of the type when it casts pointers to it, clang what is said of the name.
using Vector __attribute__((aligned(sizeof(float)), may_alias)) =
    float __attribute__((vector_size(SPARSEFT_LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

template <bool kSquared>
SPARSEFT_TARGET void add(const float* dy, const float* x, int64_t tokens, float weight, float* out, int64_t stride) {
    constexpr int64_t kVectors = 2;
    for (int64_t column = 0; column < kBlockColumns; column += kVectors * SPARSEFT_LANES) {
        Vector total[kBlockRows][kVectors] = {};
        for (int64_t first = 0; first < tokens; first += kTokensInOneSum) {
            Vector sum[kBlockRows][kVectors] = {};
            const int64_t end = std::min(tokens, first + kTokensInOneSum);
            for (int64_t t = first; t < end; ++t) {
                const auto* x_vectors = reinterpret_cast<const Vector*>(x + t * kBlockColumns + column);
                for (int64_t row = 0; row < kBlockRows; ++row) {
                    for (int64_t v = 0; v < kVectors; ++v) sum[row][v] += dy[t * kBlockRows + row] * x_vectors[v];
                }
            }
            for (int64_t row = 0; row < kBlockRows; ++row) {
                for (int64_t v = 0; v < kVectors; ++v) total[row][v] += sum[row][v];
            }
        }
        for (int64_t row = 0; row < kBlockRows; ++row) {
            auto* out_vectors = reinterpret_cast<Vector*>(out + row * stride + column);
            for (int64_t v = 0; v < kVectors; ++v) {
                out_vectors[v] += weight * (kSquared ? total[row][v] * total[row][v] : total[row][v]);
            }
        }
    }
}

constexpr OuterProduct make(const char* vector_unit) { return {vector_unit, &add<false>, &add<true>}; }

#undef SPARSEFT_LANES
#undef SPARSEFT_TARGET
