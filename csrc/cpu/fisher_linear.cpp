// fisher_linear_ and fisher_linears_ on the CPU. What they compute: sparseft/reference.py; how the work is cut:
// fisher_tiles.h.
#include <algorithm>
#include <cstring>
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

// Square one token of each of `samples`, times their weights, and make nothing of samples that count for nothing:
// there x may be infinite.
template <int64_t kWidth>
SPARSEFT_SIMD void square(const Span* spans, const float* weight, int64_t samples, float* values) {
    for (int64_t n = 0; n < samples; ++n, values += kWidth) {
        const float scale = weight ? weight[n] : 1;
        for (int64_t i = 0; i < kWidth; ++i) values[i] = spans[n].tokens() ? scale * (values[i] * values[i]) : 0;
    }
}

using Product = float[kBlockRows][kBlockColumns];

// Add the squares of a block's product to the Fisher diagonal, whose rows lie `stride` apart like those of `selected`.
// Return the sum of those that are selected, or of all.
SPARSEFT_SIMD double add_and_sum_squares(const Product& product, int64_t rows, int64_t columns, float weight,
                                         const bool* __restrict selected, float* __restrict fisher, int64_t stride) {
    float sums[kBlockColumns] = {};
    for (int64_t i = 0; i < rows; ++i, fisher += stride) {
        float squares[kBlockColumns];
        for (int64_t j = 0; j < kBlockColumns; ++j) squares[j] = product[i][j] * product[i][j];
        for (int64_t j = 0; j < columns; ++j) fisher[j] += weight * squares[j];
        if (selected) {
            uint8_t chosen[kBlockColumns] = {};  // of bool GCC makes no vectors
            std::memcpy(chosen, selected + i * stride, columns);
            for (int64_t j = 0; j < kBlockColumns; ++j) sums[j] += chosen[j] ? squares[j] : 0;
        } else {
            for (int64_t j = 0; j < kBlockColumns; ++j) sums[j] += squares[j];
        }
    }
    double sum = 0;
    for (int64_t j = 0; j < columns; ++j) sum += sums[j];
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

// Add a sample to a tile, and return the sum of its squares at selected entries.
double add_scored_sample(const Layer& layer, const Tile& tile, Packed& packed, float weight) {
    double sum = 0;
    for_each_block(tile, packed, [&](const Block& block) {
        const int64_t entry = block.row * layer.columns + block.column;
        Product product = {};
        outer_product().add(block.dy, block.x, packed.tokens(), 1, product[0], kBlockColumns);
        sum += add_and_sum_squares(product, block.rows, block.columns, weight,
                                   layer.selected ? layer.selected + entry : nullptr, layer.fisher + entry,
                                   layer.columns);
    });
    return sum;
}

// Let a sample be brought nearer while the one that is packed is multiplied. Return whether it is.
bool look_ahead(const Layer& layer, const Tile& tile, int64_t sample, Packed& packed) {
    packed.ahead.begin(packed.dy.count() * packed.x.count());
    if (sample == layer.x.samples || !layer.spans[sample].tokens()) return false;
    const Span& span = layer.spans[sample];
    packed.ahead.add(layer.dy.of_sample(sample, span.first, span.tokens(), tile.row_begin, tile.row_end));
    packed.ahead.add(layer.x.of_sample(sample, span.first, span.tokens(), tile.column_begin, tile.column_end));
    return true;
}

void add_samples(const Layer& layer, const Tile& tile, double* sums, Packed& packed) {
    bool near = false;
    for (int64_t sample = 0; sample < layer.x.samples; ++sample) {
        const Span& span = layer.spans[sample];
        if (!span.tokens()) continue;
        packed.dy.pack(layer.dy.of_sample(sample, span.first, span.tokens(), tile.row_begin, tile.row_end), near);
        packed.x.pack(layer.x.of_sample(sample, span.first, span.tokens(), tile.column_begin, tile.column_end), near);
        near = look_ahead(layer, tile, sample + 1, packed);
        const float weight = layer.weight_of(sample);
        if (sums) {
            sums[sample] = add_scored_sample(layer, tile, packed, weight);
        } else {
            add_tile(tile, packed, outer_product().add_squares, weight, layer.fisher, layer.columns);
        }
    }
}

// With one token a sample, (dy * x)**2 is dy**2 * x**2: one product sums it over many samples.
void add_one_token_samples(const Layer& layer, const Tile& tile, Packed& packed) {
    for (int64_t first = 0; first < layer.x.samples; first += kOneTokenSamples) {
        const int64_t samples = std::min(kOneTokenSamples, layer.x.samples - first);
        packed.dy.pack(layer.dy.of_samples(first, samples, tile.row_begin, tile.row_end));
        packed.x.pack(layer.x.of_samples(first, samples, tile.column_begin, tile.column_end));
        const Span* const spans = layer.spans.data() + first;
        const float* const weight = layer.weight ? layer.weight + first : nullptr;
        for (int64_t i = 0; i < packed.dy.count(); ++i) square<kBlockRows>(spans, weight, samples, packed.dy[i]);
        for (int64_t j = 0; j < packed.x.count(); ++j) square<kBlockColumns>(spans, nullptr, samples, packed.x[j]);
        add_tile(tile, packed, outer_product().add, 1, layer.fisher, layer.columns);
    }
}

void add_tile(Layer& layer, int64_t i, Packed& packed) {
    if (layer.x.tokens == 1 && !layer.scored) {
        add_one_token_samples(layer, layer.tiles[i], packed);
    } else {
        add_samples(layer, layer.tiles[i], layer.scored ? layer.sums.data() + i * layer.x.samples : nullptr, packed);
    }
}

// Threads take an equal share of every layer's tiles each.
void add_layers(std::vector<Layer>& layers) {
    int64_t operations = 0;
    for (const Layer& layer : layers) operations += layer.operations();
    const int64_t shares = std::clamp<int64_t>(operations / kSmallestShare, 1, torch::stable::get_num_threads());
    for (Layer& layer : layers) {
        layer.tiles = tiles(layer.rows, layer.columns, layer.x.tokens, shares);
        if (layer.scored) layer.sums.resize(layer.tiles.size() * layer.x.samples);
    }
    torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
        Packed packed;
        for (Layer& layer : layers) {
            const int64_t count = static_cast<int64_t>(layer.tiles.size());
            for (int64_t i = count * begin / shares; i < count * end / shares; ++i) add_tile(layer, i, packed);
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
