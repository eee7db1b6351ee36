// selected_grad_ on the CPU. What it computes: sparseft/reference.py.
//
// Up to a density of kDensest entries are products of their own. Above, whole tiles of the weight's gradient cost
// less: one at a time goes into a buffer of the thread, from which the selected entries are taken.
#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "fisher_tiles.h"
#include "sampled_product.h"

namespace sparseft {
namespace {

constexpr const char* kOp = "selected_grad_";
constexpr double kDensest = 0.2;        // here both ways take the same time, as measured with AVX-512
constexpr int64_t kTokensAtOnce = 128;  // of a tile: their panels and its buffer stay in a second-level cache

Samples one_sample(const Tensor& tensor) {
    const Matrix rows{static_cast<const char*>(tensor.data_ptr()),
                      tensor.size(0),
                      tensor.size(1),
                      tensor.stride(0),
                      tensor.stride(1),
                      static_cast<int64_t>(tensor.element_size()),
                      tensor.scalar_type()};
    return {rows, 0};
}

// Add the selected entries of a tile of the gradient, `product` [tile.rows(), tile.columns()], to grad.
void add_entries(const Tile& tile, const float* product, const Selection& at, int64_t columns, float* grad) {
    for (int64_t row = tile.row_begin; row < tile.row_end; ++row, product += tile.columns()) {
        const int64_t first = row * columns + tile.column_begin, last = row * columns + tile.column_end;
        for_each_position(at, first_from(at, first), first_from(at, last),
                          [&](int64_t j, int64_t position) { grad[j] += product[position - first]; });
    }
}

void add_by_tiles(const Samples& x, const Samples& dy, const Selection& at, float* grad) {
    const int64_t rows = dy.first.columns, columns = x.first.columns, tokens = x.first.rows;
    const std::vector<Tile> all = tiles(rows, columns, kTokensAtOnce, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, static_cast<int64_t>(all.size()), 1, [&](int64_t begin, int64_t end) {
        Packed packed;
        std::vector<float> product;
        for (int64_t i = begin; i < end; ++i) {
            const Tile& tile = all[i];
            product.assign(tile.rows() * tile.columns(), 0.0f);
            for (int64_t first = 0; first < tokens; first += kTokensAtOnce) {
                const TokenBlock block{0, first, std::min(kTokensAtOnce, tokens - first), 0};
                packed.dy.pack(dy.at(block, tile.row_begin, tile.row_end));
                packed.x.pack(x.at(block, tile.column_begin, tile.column_end));
                add_tile({0, tile.rows(), 0, tile.columns()}, packed, outer_product().add, 1, product.data(),
                         tile.columns());
            }
            add_entries(tile, product.data(), at, columns, grad);
        }
    });
}

void check_input(const char* name, const Tensor& tensor, const Tensor& x, const Place& place) {
    const Argument argument{kOp, name};
    check_dtype(argument, tensor, kFloatTypes);
    check_device(argument, tensor, place);
    check(tensor.dim() == 2, argument, " must be [tokens, features], got ", tensor.dim(),
          " dimensions; flatten samples and tokens");
    check(tensor.size(0) == x.size(0), argument, " must have the tokens of x, ", x.size(0), ", got ", tensor.size(0));
    check(tensor.scalar_type() == x.scalar_type(), argument, " must have the dtype of x, ",
          dtype_name(x.scalar_type()), ", got ", dtype_name(tensor.scalar_type()), "; convert it with .to()");
}

void selected_grad_(const Tensor& grad, const Tensor& x, const Tensor& dy, const Tensor& indices) {
    const Place place(grad);
    check_input("x", x, x, place);
    check_input("dy", dy, x, place);
    const Selection at = matrix_entries(kOp, indices, dy.size(1) * x.size(1), place);
    const Argument argument{kOp, "grad"};
    check_dtype(argument, grad, {ScalarType::Float});
    check_numel(argument, grad, at.k, "one for each of indices");
    check_contiguous(argument, grad);
    if (at.k == 0 || x.numel() == 0) return;
    const Samples left = one_sample(dy), right = one_sample(x);
    float* const out = static_cast<float*>(grad.data_ptr());
    if (static_cast<double>(at.k) / at.numel > kDensest) return add_by_tiles(right, left, at, out);
    const Entries entries(at, x.size(1));
    SampledProduct(left, right, entries, out).add(1, x.size(0));
}

}  // namespace
}  // namespace sparseft

STABLE_TORCH_LIBRARY_IMPL(sparseft, CPU, m) { m.impl("selected_grad_", TORCH_BOX(&sparseft::selected_grad_)); }
