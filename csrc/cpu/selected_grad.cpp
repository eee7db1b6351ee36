// selected_grad_ on the CPU. What it computes: sparseft/reference.py.
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "sampled_product.h"

namespace sparseft {
namespace {

constexpr const char* kOp = "selected_grad_";

Factor factor(const Tensor& tensor) {
    return {static_cast<const char*>(tensor.data_ptr()),
            tensor.scalar_type(),
            tensor.size(1),
            static_cast<int64_t>(tensor.element_size()),
            0,
            tensor.stride(0),
            tensor.stride(1)};
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

// The plan is the GPU's: here it would save a few percent.
void selected_grad_(const Tensor& grad, const Tensor& x, const Tensor& dy, const Tensor& indices,
                    const std::optional<Tensor>&) {
    const Place place(grad);
    check_input("x", x, x, place);
    check_input("dy", dy, x, place);
    check_entries(Argument{kOp, "indices"}, indices, dy.size(1) * x.size(1), place);
    const Argument argument{kOp, "grad"};
    check_dtype(argument, grad, {ScalarType::Float});
    check_numel(argument, grad, indices.numel(), "one for each of indices");
    check_contiguous(argument, grad);
    if (grad.numel() == 0 || x.numel() == 0) return;
    const Factor left = factor(dy), right = factor(x);
    const Entries entries(indices, x.size(1));
    SampledProduct(left, right, entries, static_cast<float*>(grad.data_ptr())).add(1, x.size(0));
}

}  // namespace
}  // namespace sparseft

STABLE_TORCH_LIBRARY_IMPL(sparseft, CPU, m) { m.impl("selected_grad_", TORCH_BOX(&sparseft::selected_grad_)); }
