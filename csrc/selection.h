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
    int32_t place;  // of the tensor in its list
    int8_t element_size;
    bool wide_indices;  // int64 instead of int32
};

// Build the Selection of a tensor from its entry in an op's list `indices`. The indices themselves are not looked at:
// a Device's `check_indices` does that, for all lists of a call.
inline Selection select(const Argument& tensor_argument, const Tensor& tensor, const Tensor& indices,
                        const Place& place) {
    const Argument argument{tensor_argument.op, "indices", tensor_argument.position};
    check_dtype(argument, indices, kIndexTypes);
    check_contiguous(argument, indices);
    check_device(argument, indices, place);
    return {tensor.data_ptr(),
            indices.data_ptr(),
            tensor.numel(),
            indices.numel(),
            static_cast<int32_t>(argument.position),
            static_cast<int8_t>(tensor.element_size()),
            dtype_of(indices) == ScalarType::Long};
}

}  // namespace sparseft
