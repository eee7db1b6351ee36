// fisher_linear_ and fisher_linears_ on the CPU. What they compute: sparseft/reference.py; how the work is cut:
// fisher_tiles.h.
#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "fisher_tiles.h"
#include "simd.h"
#include "token_spans.h"

namespace sparseft {
namespace {

constexpr int64_t kOneTokenSamples = 256;  // that go into one product
constexpr int64_t kLanes = 16;             // partial sums that a vector unit adds to at a time

SPARSEFT_SIMD void add(const float* __restrict product, int64_t n, float* __restrict fisher) {
    for (int64_t i = 0; i < n; ++i) fisher[i] += product[i];
}

SPARSEFT_SIMD void square(float weight, int64_t n, float* __restrict values) {
    for (int64_t i = 0; i < n; ++i) values[i] *= weight * values[i];
}

// The sum of squares of those values that are selected, or of all.
SPARSEFT_SIMD double sum_squares(const float* values, const bool* selected, int64_t n) {
    float lanes[kLanes] = {};
    double sum = 0;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int64_t j = 0; j < kLanes; ++j) {
            const float squared = values[i + j] * values[i + j];
            lanes[j] += !selected || selected[i + j] ? squared : 0;
        }
    }
    for (; i < n; ++i) sum += !selected || selected[i] ? values[i] * values[i] : 0;
    for (const float lane : lanes) sum += lane;
    return sum;
}

struct Layer {
    Input x, dy;
    int64_t rows, columns;
    float* fisher;  // [rows, columns]
    std::vector<Span> spans;
    const float* weight = nullptr;  // [N], or null for ones
    bool scored = false;
    const bool* selected = nullptr;  // [rows, columns], or null for all
    std::vector<Tile> tiles = {};
    std::vector<double> sums = {};  // [tiles, N], where scored

    float weight_of(int64_t sample) const { return weight ? weight[sample] : 1; }

    int64_t operations() const {
        int64_t tokens = 0;
        for (const Span& span : spans) tokens += span.tokens();
        return tokens * rows * columns;
    }
};

// Call `visit(product, n, entry)` for each row of a tile, `entry` being the position of its first entry in the layer.
template <class Visit>
void for_each_row(const Layer& layer, const Tile& tile, const float* product, const Visit& visit) {
    for (int64_t row = tile.row_begin; row < tile.row_end; ++row, product += tile.columns()) {
        visit(product, tile.columns(), row * layer.columns + tile.column_begin);
    }
}

void add_tile(const Layer& layer, const Tile& tile, double* sums, Buffers& buffers) {
    const Matrix product = buffers.product_of(tile);
    for (int64_t sample = 0; sample < layer.x.samples; ++sample) {
        const Span& span = layer.spans[sample];
        if (!span.tokens()) continue;
        const Matrix dy = layer.dy.of_sample(sample, span.first, span.tokens(), tile.row_begin, tile.row_end);
        const Matrix x = layer.x.of_sample(sample, span.first, span.tokens(), tile.column_begin, tile.column_end);
        multiply(readable(dy, buffers.dy).transposed(), readable(x, buffers.x), product);
        const float weight = layer.weight_of(sample);
        for_each_row(layer, tile, buffers.product.data(), [&](const float* row, int64_t n, int64_t entry) {
            if (sums) sums[sample] += sum_squares(row, layer.selected ? layer.selected + entry : nullptr, n);
            add_squares(row, weight, n, layer.fisher + entry);
        });
    }
}

// With one token a sample, (dy * x)**2 is dy**2 * x**2: one product sums it over many samples.
void add_one_token_tile(const Layer& layer, const Tile& tile, Buffers& buffers) {
    const Matrix product = buffers.product_of(tile);
    for (int64_t first = 0; first < layer.x.samples; first += kOneTokenSamples) {
        const int64_t samples = std::min(kOneTokenSamples, layer.x.samples - first);
        const Matrix dy = packed(layer.dy.of_samples(first, samples, tile.row_begin, tile.row_end), buffers.dy);
        const Matrix x = packed(layer.x.of_samples(first, samples, tile.column_begin, tile.column_end), buffers.x);
        for (int64_t i = 0; i < samples; ++i) {
            square(layer.weight_of(first + i), tile.rows(), buffers.dy.data() + i * tile.rows());
            float* row = buffers.x.data() + i * tile.columns();
            // not multiplied by zeros: it may be infinite
            if (!layer.spans[first + i].tokens()) std::fill_n(row, tile.columns(), 0.0f);
        }
        square(1, samples * tile.columns(), buffers.x.data());
        multiply(dy.transposed(), x, product);
        for_each_row(layer, tile, buffers.product.data(),
                     [&](const float* row, int64_t n, int64_t entry) { add(row, n, layer.fisher + entry); });
    }
}

void add_tile(Layer& layer, int64_t i, Buffers& buffers) {
    if (layer.x.tokens == 1 && !layer.scored) {
        add_one_token_tile(layer, layer.tiles[i], buffers);
    } else {
        add_tile(layer, layer.tiles[i], layer.scored ? layer.sums.data() + i * layer.x.samples : nullptr, buffers);
    }
}

// Threads take an equal share of every layer's tiles each.
void add_layers(std::vector<Layer>& layers) {
    int64_t operations = 0;
    for (const Layer& layer : layers) operations += layer.operations();
    const int64_t shares = std::clamp<int64_t>(operations / kSmallestShare, 1, torch::stable::get_num_threads());
    for (Layer& layer : layers) {
        layer.tiles = tiles(layer.rows, layer.columns, shares);
        if (layer.scored) layer.sums.resize(layer.tiles.size() * layer.x.samples);
    }
    torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
        Buffers buffers;
        for (Layer& layer : layers) {
            const int64_t count = static_cast<int64_t>(layer.tiles.size());
            for (int64_t i = count * begin / shares; i < count * end / shares; ++i) add_tile(layer, i, buffers);
        }
    });
}

void check_input(const Argument& argument, const Tensor& tensor, const Tensor& x, const Tensor& fisher) {
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

void check_layer(const Argument& out, const Argument& x_argument, const Argument& dy_argument, const Tensor& fisher,
                 const Tensor& x, const Tensor& dy) {
    check_dtype(out, fisher, {ScalarType::Float});
    check_contiguous(out, fisher);
    check_input(x_argument, x, x, fisher);
    check_input(dy_argument, dy, x, fisher);
    check(fisher.dim() == 2 && fisher.size(0) == dy.size(2) && fisher.size(1) == x.size(2), out,
          " must be [features of dy, features of x], [", dy.size(2), ", ", x.size(2), "], got another shape");
}

// Add a layer to the list, unless nothing is to be added to its Fisher diagonal.
void append(std::vector<Layer>& layers, const Tensor& fisher, const Tensor& x, const Tensor& dy) {
    if (x.numel() == 0 || dy.numel() == 0) return;
    const Input input(dy);
    layers.push_back(
        {Input(x), input, dy.size(2), x.size(2), static_cast<float*>(fisher.data_ptr()), token_spans(input)});
}

void check_per_sample(const char* name, const Tensor& tensor, const Tensor& x, const Tensor& fisher) {
    const Argument argument{"fisher_linear_", name};
    check_dtype(argument, tensor, {ScalarType::Float});
    check_numel(argument, tensor, x.size(0), "one a sample");
    check_device(argument, tensor, fisher);
}

void fisher_linear_(const Tensor& fisher, const Tensor& x, const Tensor& dy,
                    const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& scores,
                    const std::optional<Tensor>& selected) {
    constexpr char kOp[] = "fisher_linear_";
    check_layer({kOp, "fisher"}, {kOp, "x"}, {kOp, "dy"}, fisher, x, dy);
    std::optional<Tensor> weight, chosen;
    if (sample_weight) {
        check_per_sample("sample_weight", *sample_weight, x, fisher);
        weight = torch::stable::contiguous(*sample_weight);
    }
    if (scores) {
        check_per_sample("scores", *scores, x, fisher);
        check_contiguous({kOp, "scores"}, *scores);
    }
    if (selected) {
        const Argument argument{kOp, "selected"};
        check(scores.has_value(), argument, " restricts scores, got no scores; pass them, or leave selected out");
        check_dtype(argument, *selected, {ScalarType::Bool});
        check_device(argument, *selected, fisher);
        check(selected->dim() == 2 && selected->size(0) == fisher.size(0) && selected->size(1) == fisher.size(1),
              argument, " must have the shape of fisher, [", fisher.size(0), ", ", fisher.size(1),
              "], got another shape");
        chosen = torch::stable::contiguous(*selected);
    }
    std::vector<Layer> layers;
    append(layers, fisher, x, dy);
    if (layers.empty()) return;

    Layer& layer = layers[0];
    if (weight) layer.weight = static_cast<const float*>(weight->data_ptr());
    if (chosen) layer.selected = static_cast<const bool*>(chosen->data_ptr());
    layer.scored = scores.has_value();
    add_layers(layers);
    if (!layer.scored) return;
    float* score = static_cast<float*>(scores->data_ptr());
    for (int64_t sample = 0; sample < layer.x.samples; ++sample) {
        double sum = 0;
        for (size_t i = sample; i < layer.sums.size(); i += layer.x.samples) sum += layer.sums[i];
        score[sample] += static_cast<float>(sum);
    }
}

void fisher_linears_(const std::vector<Tensor>& fishers, const std::vector<Tensor>& xs,
                     const std::vector<Tensor>& dys) {
    constexpr char kOp[] = "fisher_linears_";
    check_length({kOp, "xs"}, xs, fishers.size());
    check_length({kOp, "dys"}, dys, fishers.size());
    std::vector<const void*> addresses;
    for (size_t i = 0; i < fishers.size(); ++i) {
        const int64_t position = static_cast<int64_t>(i);
        check_layer({kOp, "fishers", position}, {kOp, "xs", position}, {kOp, "dys", position}, fishers[i], xs[i],
                    dys[i]);
        if (fishers[i].numel()) addresses.push_back(fishers[i].data_ptr());
    }
    std::sort(addresses.begin(), addresses.end());
    check(std::adjacent_find(addresses.begin(), addresses.end()) == addresses.end(), kOp,
          ": fishers must not share memory, got the same twice; call once for each use");
    std::vector<Layer> layers;
    for (size_t i = 0; i < fishers.size(); ++i) append(layers, fishers[i], xs[i], dys[i]);
    add_layers(layers);
}

}  // namespace
}  // namespace sparseft

STABLE_TORCH_LIBRARY_IMPL(sparseft, CPU, m) {
    m.impl("fisher_linear_", TORCH_BOX(&sparseft::fisher_linear_));
    m.impl("fisher_linears_", TORCH_BOX(&sparseft::fisher_linears_));
}
