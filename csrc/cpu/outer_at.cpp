// outer_at on the CPU. What it computes: sparseft/reference.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "sampled_product.h"

namespace sparseft {
namespace {

Samples samples(const Tensor& tensor) {
    const Matrix first{static_cast<const char*>(tensor.data_ptr()),
                       tensor.size(1),
                       tensor.size(2),
                       tensor.stride(1),
                       tensor.stride(2),
                       static_cast<int64_t>(tensor.element_size()),
                       tensor.scalar_type()};
    return {first, tensor.stride(0)};
}

void check_input(const char* name, const Tensor& tensor, const Tensor& left) {
    const Argument argument{"outer_at", name};
    check_dtype(argument, tensor, kFloatTypes);
    check_device(argument, tensor, left);
    check(tensor.dim() == 3, argument, " must be [samples, tokens, features], got ", tensor.dim(),
          " dimensions; insert the missing one with unsqueeze");
    check(tensor.size(0) == left.size(0) && tensor.size(1) == left.size(1), argument,
          " must have the samples and tokens of left, ", left.size(0), " and ", left.size(1), ", got ", tensor.size(0),
          " and ", tensor.size(1));
    check(tensor.scalar_type() == left.scalar_type(), argument, " must have the dtype of left, ",
          dtype_name(left.scalar_type()), ", got ", dtype_name(tensor.scalar_type()), "; convert it with .to()");
}

Tensor outer_at(const Tensor& left, const Tensor& right, const Tensor& indices) {
    check_input("left", left, left);
    check_input("right", right, left);
    check_dtype({"outer_at", "indices"}, indices, kPositionTypes);
    const Selection at = matrix_entries("outer_at", indices, left.size(2) * right.size(2), left);
    Tensor result = torch::stable::new_zeros(left, {left.size(0), at.k}, ScalarType::Float);
    if (result.numel() == 0 || left.numel() == 0) return result;
    const Samples left_samples = samples(left), right_samples = samples(right);
    const Entries entries(at, right.size(2));
    SampledProduct(left_samples, right_samples, entries, static_cast<float*>(result.data_ptr()))
        .add(left.size(0), left.size(1));
    return result;
}

}  // namespace
}  // namespace sparseft

STABLE_TORCH_LIBRARY_IMPL(sparseft, CPU, m) { m.impl("outer_at", TORCH_BOX(&sparseft::outer_at)); }
