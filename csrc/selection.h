// Which entries of a tensor an op works on, as plain pointers that CPU loops and CUDA kernels both understand.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

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
void check_indices(const Argument& argument, const Argument& tensor, const Index* indices, int64_t k, int64_t numel) {
    bool ascending = true;
    for (int64_t i = 1; i < k; ++i) ascending &= indices[i - 1] < indices[i];
    if (!ascending) {
        const Index* second = std::adjacent_find(indices, indices + k, std::greater_equal<Index>()) + 1;
        fail(argument, " must be sorted and unique, got ", *second, " after ", second[-1], " at ", second - indices,
             "; sort it and drop repeated entries");
    }
    check(indices[0] >= 0 && indices[k - 1] < numel, argument, " must be from 0 to ", numel - 1, ", inside ",
          tensor.name, '[', tensor.position, "], got ", indices[0], " to ", indices[k - 1],
          "; use a mask made for this model");
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
    if (at.k == 0 || tensor.is_cuda()) return at;
    if (wide) {
        check_indices(argument, tensor_argument, static_cast<const int64_t*>(at.indices), at.k, at.numel);
    } else {
        check_indices(argument, tensor_argument, static_cast<const int32_t*>(at.indices), at.k, at.numel);
    }
    return at;
}

}  // namespace sparseft
