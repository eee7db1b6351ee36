// layer_norm_backward on the CPU. What it computes: sparseft/reference.py.
//
// dy and x are read once. Threads share blocks of tokens; what a block adds to the gradients of weight and bias is
// summed over the blocks of a sample afterwards, so that results do not depend on the number of threads.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "simd.h"

namespace sparseft {
namespace {

constexpr char kOp[] = "layer_norm_backward";
constexpr int64_t kTokensInBlock = 32;
constexpr int64_t kLanes = 16;                // sums side by side: floats of the widest vector
constexpr int64_t kFewestElements = 1 << 15;  // for which a thread is started

// Tokens one after the other, with `features` numbers each; mean and rstd have one.
struct Tokens {
    const float *dy, *x, *mean, *rstd;
    float* dx;
    int64_t features;

    Tokens from(int64_t first) const {
        const int64_t at = first * features;
        return {dy + at, x + at, mean + first, rstd + first, dx + at, features};
    }
};

float* data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// Write the gradient of one token's x, and add what it gives to those of weight and bias.
SPARSEFT_SIMD void pull_back(const Tokens& token, const float* __restrict weight, float* __restrict weight_gradient,
                             float* __restrict bias_gradient) {
    const float* __restrict const dy = token.dy;
    const float* __restrict const x = token.x;
    const float mean = *token.mean, rstd = *token.rstd;
    const int64_t features = token.features;
    float sums[kLanes] = {}, products[kLanes] = {};
    const int64_t whole = features / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const float normalized = (x[i + lane] - mean) * rstd, scaled = dy[i + lane] * weight[i + lane];
            sums[lane] += scaled;
            products[lane] += scaled * normalized;
            weight_gradient[i + lane] += dy[i + lane] * normalized;
            bias_gradient[i + lane] += dy[i + lane];
        }
    }
    for (int64_t i = whole; i < features; ++i) {
        const float normalized = (x[i] - mean) * rstd, scaled = dy[i] * weight[i];
        sums[i - whole] += scaled;
        products[i - whole] += scaled * normalized;
        weight_gradient[i] += dy[i] * normalized;
        bias_gradient[i] += dy[i];
    }
    double sum = 0, product = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[lane], product += products[lane];
    const float of_mean = static_cast<float>(sum / features), of_rstd = static_cast<float>(product / features);
    float* __restrict const dx = token.dx;
    for (int64_t i = 0; i < features; ++i) {
        dx[i] = rstd * (dy[i] * weight[i] - of_mean - (x[i] - mean) * rstd * of_rstd);
    }
}

SPARSEFT_SIMD void add(const float* __restrict values, int64_t n, float* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] += values[i];
}

void check_input(const char* name, const Tensor& tensor, const Tensor& dy, std::initializer_list<int64_t> sizes,
                 const char* meaning) {
    const Argument argument{kOp, name};
    check_dtype(argument, tensor, {ScalarType::Float});
    check_device(argument, tensor, dy);
    bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
    for (int64_t dim = 0; fits && dim < tensor.dim(); ++dim) fits = tensor.size(dim) == sizes.begin()[dim];
    check(fits, argument, " must be ", meaning, ", got another shape; reshape it");
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy_given, const Tensor& x_given,
                                                       const Tensor& mean_given, const Tensor& rstd_given,
                                                       const std::optional<Tensor>& weight_given) {
    check(dy_given.dim() == 3, Argument{kOp, "dy"}, " must be [samples, tokens, features], got ", dy_given.dim(),
          " dimensions; insert the missing one with unsqueeze");
    const int64_t samples = dy_given.size(0), tokens = dy_given.size(1), features = dy_given.size(2);
    check_input("dy", dy_given, dy_given, {samples, tokens, features}, "[samples, tokens, features]");
    check_input("x", x_given, dy_given, {samples, tokens, features}, "of the shape of dy");
    check_input("mean", mean_given, dy_given, {samples, tokens}, "one number a token of dy, [samples, tokens]");
    check_input("rstd", rstd_given, dy_given, {samples, tokens}, "one number a token of dy, [samples, tokens]");
    if (weight_given) check_input("weight", *weight_given, dy_given, {features}, "one number a feature of dy");

    const Tensor dy = torch::stable::contiguous(dy_given), x = torch::stable::contiguous(x_given);
    const Tensor mean = torch::stable::contiguous(mean_given), rstd = torch::stable::contiguous(rstd_given);
    std::vector<float> weight(features, 1.0f);
    if (weight_given) {
        std::copy_n(data(torch::stable::contiguous(*weight_given)), features, weight.begin());
    }
    const Tensor dx = torch::stable::new_empty(dy, {samples, tokens, features});
    const Tensor weight_gradient = torch::stable::new_zeros(dy, {samples, features});
    const Tensor bias_gradient = torch::stable::new_zeros(dy, {samples, features});
    if (dy.numel() == 0) return {dx, weight_gradient, bias_gradient};

    const int64_t blocks = (tokens + kTokensInBlock - 1) / kTokensInBlock;
    const Tensor of_blocks = torch::stable::new_zeros(dy, {samples * blocks, 2, features});
    float* const sums = data(of_blocks);
    const Tokens all{data(dy), data(x), data(mean), data(rstd), data(dx), features};
    const int64_t share = std::max<int64_t>(1, kFewestElements / (std::min(tokens, kTokensInBlock) * features));
    torch::stable::parallel_for(0, samples * blocks, share, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t sample = block / blocks, first = block % blocks * kTokensInBlock;
            float* const own = sums + block * 2 * features;
            for (int64_t t = first; t < std::min(tokens, first + kTokensInBlock); ++t) {
                pull_back(all.from(sample * tokens + t), weight.data(), own, own + features);
            }
        }
    });
    for (int64_t block = 0; block < samples * blocks; ++block) {
        const float* const own = sums + block * 2 * features;
        const int64_t at = block / blocks * features;
        add(own, features, data(weight_gradient) + at);
        add(own + features, features, data(bias_gradient) + at);
    }
    return {dx, weight_gradient, bias_gradient};
}

}  // namespace
}  // namespace sparseft

STABLE_TORCH_LIBRARY_IMPL(sparseft, CPU, m) {
    m.impl("layer_norm_backward", TORCH_BOX(&sparseft::layer_norm_backward));
}
