// Which entries of a tensor an op works on, as plain pointers that CPU loops and CUDA kernels both understand.
#pragma once

#include <cstdint>

#include "checks.h"

namespace sparseft {

// `k` positions, sorted and unique, in the `numel` elements at `data`.
struct Selection {
    void* data;
    const void* indices;
    int64_t numel;
    int64_t k;
    int8_t element_size;
    bool wide_indices;  // int64 instead of int32
};

template <class Index>
bool ascending_below(const Index* indices, int64_t k, int64_t numel) {
    bool ascending = true;
    for (int64_t i = 1; i < k; ++i) ascending &= indices[i - 1] < indices[i];
    return ascending && indices[0] >= 0 && indices[k - 1] < numel;
}

// Build the Selection of a tensor from its entry in an op's list `indices`. Kernels on the CPU rely on the check of
// the indices: they write wherever one points. On CUDA it would cost a synchronisation, so kernels there trap instead.
inline Selection select(const Argument& tensor_argument, const Tensor& tensor, const Tensor& indices) {
    const Argument argument{tensor_argument.op, "indices", tensor_argument.position};
    check_dtype(argument, indices, kIndexTypes);
    check_contiguous(argument, indices);
    check_device(argument, indices, tensor);
    const bool wide = indices.scalar_type() == ScalarType::Long;
    const auto element_size = static_cast<int8_t>(tensor.element_size());
    const Selection at{tensor.data_ptr(), indices.data_ptr(), tensor.numel(), indices.numel(), element_size, wide};
    if (at.k > 0 && tensor.is_cpu()) {
        const bool good = wide ? ascending_below(static_cast<const int64_t*>(at.indices), at.k, at.numel)
                               : ascending_below(static_cast<const int32_t*>(at.indices), at.k, at.numel);
        check(good, argument, " must be sorted, unique and from 0 to below ", at.numel, ", the elements of ",
              tensor_argument, ", got something else; was the mask made for another model?");
    }
    return at;
}

}  // namespace sparseft
