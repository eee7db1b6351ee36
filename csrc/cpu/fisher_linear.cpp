// fisher_linear_ on the CPU. What it computes: sparseft/reference.py; how the work is cut: fisher_tiles.h.
#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "fisher_tiles.h"
#include "simd.h"

namespace sparseft {
namespace {

constexpr int64_t kOneTokenSamples = 256;  // that go into one product

SPARSEFT_SIMD void add(const float* __restrict product, int64_t n, float* __restrict fisher) {
    for (int64_t i = 0; i < n; ++i) fisher[i] += product[i];
}

SPARSEFT_SIMD void square(float weight, int64_t n, float* __restrict values) {
    for (int64_t i = 0; i < n; ++i) values[i] *= weight * values[i];
}

// x or dy: [N, T, features].
struct Input {
    char* data;
    ScalarType dtype;
    int64_t element_size, sample_stride, token_stride, feature_stride;

    explicit Input(const Tensor& tensor)
        : data(static_cast<char*>(tensor.data_ptr())),
          dtype(tensor.scalar_type()),
          element_size(tensor.element_size()),
          sample_stride(tensor.stride(0)),
          token_stride(tensor.stride(1)),
          feature_stride(tensor.stride(2)) {}

    // Features begin..end of one sample, [T, end - begin].
    Matrix of_sample(int64_t sample, int64_t tokens, int64_t begin, int64_t end) const {
        return {data + (sample * sample_stride + begin * feature_stride) * element_size,
                tokens,
                end - begin,
                token_stride,
                feature_stride,
                dtype};
    }

    // Features begin..end of the first token of `samples` samples, [samples, end - begin].
    Matrix of_samples(int64_t first, int64_t samples, int64_t begin, int64_t end) const {
        return {data + (first * sample_stride + begin * feature_stride) * element_size,
                samples,
                end - begin,
                sample_stride,
                feature_stride,
                dtype};
    }
};

struct Problem {
    int64_t samples, tokens, columns, rows;
    Input x, dy;
    const float* weight;  // [N], or null for ones
    float* fisher;        // [rows, columns]

    float weight_of(int64_t sample) const { return weight ? weight[sample] : 1; }
};

// Call `accumulate(product, n, fisher)` for each row of a tile.
template <class Accumulate>
void for_each_row(const Problem& p, const Tile& tile, const float* product, const Accumulate& accumulate) {
    for (int64_t row = tile.row_begin; row < tile.row_end; ++row, product += tile.columns()) {
        accumulate(product, tile.columns(), p.fisher + row * p.columns + tile.column_begin);
    }
}

void add_tile(const Problem& p, const Tile& tile, Buffers& buffers) {
    const Matrix product = buffers.product_of(tile);
    for (int64_t sample = 0; sample < p.samples; ++sample) {
        const Matrix dy = p.dy.of_sample(sample, p.tokens, tile.row_begin, tile.row_end);
        const Matrix x = p.x.of_sample(sample, p.tokens, tile.column_begin, tile.column_end);
        multiply(readable(dy, buffers.dy).transposed(), readable(x, buffers.x), product);
        const float weight = p.weight_of(sample);
        for_each_row(p, tile, buffers.product.data(),
                     [weight](const float* row, int64_t n, float* fisher) { add_squares(row, weight, n, fisher); });
    }
}

// With one token a sample, (dy * x)**2 is dy**2 * x**2: one product sums it over many samples.
void add_one_token_tile(const Problem& p, const Tile& tile, Buffers& buffers) {
    const Matrix product = buffers.product_of(tile);
    for (int64_t first = 0; first < p.samples; first += kOneTokenSamples) {
        const int64_t samples = std::min(kOneTokenSamples, p.samples - first);
        const Matrix dy = packed(p.dy.of_samples(first, samples, tile.row_begin, tile.row_end), buffers.dy);
        const Matrix x = packed(p.x.of_samples(first, samples, tile.column_begin, tile.column_end), buffers.x);
        for (int64_t i = 0; i < samples; ++i) {
            square(p.weight_of(first + i), tile.rows(), buffers.dy.data() + i * tile.rows());
        }
        square(1, samples * tile.columns(), buffers.x.data());
        multiply(dy.transposed(), x, product);
        for_each_row(p, tile, buffers.product.data(), add);
    }
}

void check_input(const char* name, const Tensor& tensor, const Tensor& x, const Tensor& fisher) {
    const Argument argument{"fisher_linear_", name};
    check_dtype(argument, tensor, kFloatTypes);
    check_device(argument, tensor, fisher);
    check(tensor.dim() == 3, argument, " must be [samples, tokens, features], got ", tensor.dim(),
          " dimensions; insert the missing one with unsqueeze");
    check(tensor.size(0) == x.size(0) && tensor.size(1) == x.size(1), argument,
          " must have the samples and tokens of x, ", x.size(0), " and ", x.size(1), ", got ", tensor.size(0), " and ",
          tensor.size(1));
    check(tensor.scalar_type() == x.scalar_type(), argument, " must have the dtype of x, ",
          dtype_name(x.scalar_type()), ", got ", dtype_name(tensor.scalar_type()), "; convert it with .to()");
}

void fisher_linear_(const Tensor& fisher, const Tensor& x, const Tensor& dy,
                    const std::optional<Tensor>& sample_weight) {
    const Argument out{"fisher_linear_", "fisher"};
    check_dtype(out, fisher, {ScalarType::Float});
    check_contiguous(out, fisher);
    check_input("x", x, x, fisher);
    check_input("dy", dy, x, fisher);
    check(fisher.dim() == 2 && fisher.size(0) == dy.size(2) && fisher.size(1) == x.size(2), out,
          " must be [features of dy, features of x], [", dy.size(2), ", ", x.size(2), "], got another shape");
    std::optional<Tensor> weight;
    if (sample_weight.has_value()) {
        const Argument argument{"fisher_linear_", "sample_weight"};
        check_dtype(argument, *sample_weight, {ScalarType::Float});
        check_numel(argument, *sample_weight, x.size(0), "one a sample");
        check_device(argument, *sample_weight, fisher);
        weight = torch::stable::contiguous(*sample_weight);
    }
    if (x.numel() == 0 || dy.numel() == 0) return;

    const Problem problem{x.size(0),
                          x.size(1),
                          x.size(2),
                          dy.size(2),
                          Input(x),
                          Input(dy),
                          weight ? static_cast<const float*>(weight->data_ptr()) : nullptr,
                          static_cast<float*>(fisher.data_ptr())};
    const std::vector<Tile> work = tiles(problem.rows, problem.columns, torch::stable::get_num_threads());
    const int64_t count = static_cast<int64_t>(work.size());
    const int64_t operations = x.numel() * problem.rows;
    const int64_t grain = std::max<int64_t>(1, kSmallestShare * count / operations);
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        Buffers buffers;
        for (int64_t i = begin; i < end; ++i) {
            problem.tokens == 1 ? add_one_token_tile(problem, work[i], buffers) : add_tile(problem, work[i], buffers);
        }
    });
}

}  // namespace
}  // namespace sparseft

STABLE_TORCH_LIBRARY_IMPL(sparseft, CPU, m) { m.impl("fisher_linear_", TORCH_BOX(&sparseft::fisher_linear_)); }
