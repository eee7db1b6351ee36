// The block of outer_product.h for one vector unit. Included once for each, inside a namespace of its own: a vector
// wider than what a function is compiled for gets cut into pieces before anything is inlined, so no template can be
// shared.
//
// SPARSEFT_TARGET: attribute that names the unit; SPARSEFT_LANES: floats of a vector. Both end with this file.

using Vector = float __attribute__((vector_size(SPARSEFT_LANES * sizeof(float))));

template <bool kSquared>
SPARSEFT_TARGET void add(const float* dy, const float* x, int64_t tokens, float weight, float* out, int64_t stride) {
    constexpr int64_t kVectors = 2;
    for (int64_t column = 0; column < kBlockColumns; column += kVectors * SPARSEFT_LANES) {
        Vector total[kBlockRows][kVectors] = {};
        for (int64_t first = 0; first < tokens; first += kTokensInOneSum) {
            Vector sum[kBlockRows][kVectors] = {};
            const int64_t end = std::min(tokens, first + kTokensInOneSum);
            for (int64_t t = first; t < end; ++t) {
                Vector values[kVectors];
                for (int64_t v = 0; v < kVectors; ++v) {
                    std::memcpy(&values[v], x + t * kBlockColumns + column + v * SPARSEFT_LANES, sizeof(Vector));
                }
                for (int64_t row = 0; row < kBlockRows; ++row) {
                    for (int64_t v = 0; v < kVectors; ++v) sum[row][v] += dy[t * kBlockRows + row] * values[v];
                }
            }
            for (int64_t row = 0; row < kBlockRows; ++row) {
                for (int64_t v = 0; v < kVectors; ++v) total[row][v] += sum[row][v];
            }
        }
        for (int64_t row = 0; row < kBlockRows; ++row) {
            for (int64_t v = 0; v < kVectors; ++v) {
                float* const entries = out + row * stride + column + v * SPARSEFT_LANES;
                Vector values;
                std::memcpy(&values, entries, sizeof(values));
                values += weight * (kSquared ? total[row][v] * total[row][v] : total[row][v]);
                std::memcpy(entries, &values, sizeof(values));
            }
        }
    }
}

constexpr OuterProduct make(const char* vector_unit) { return {vector_unit, &add<false>, &add<true>}; }

#undef SPARSEFT_LANES
#undef SPARSEFT_TARGET
