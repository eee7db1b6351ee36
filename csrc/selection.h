// Which entries of a tensor an op works on, as plain pointers that CPU loops and CUDA kernels both understand.
#pragma once

#include <cstdint>

#include "checks.h"
#include "host_device.h"

namespace sparseft {

// The forms of an index list, see sparseft/index_lists.py.
enum class IndexForm : int8_t { kInt32, kInt64, kPacked };

inline const std::initializer_list<ScalarType> kIndexTypes = {ScalarType::Int, ScalarType::Long, ScalarType::Short};

// `k` positions, sorted and unique, in the `numel` elements at `data`, which is null where only positions matter.
struct Selection {
    void* data;
    const void* indices;
    int64_t numel;
    int64_t k;
    int32_t place;  // of the tensor in its list, -1 outside a list
    int8_t element_size;
    IndexForm form;
};

// Elements of a tensor whose selected entries a packed list holds together.
constexpr int64_t kPackBlock = 8192;

// The parts of a packed list: entry i of block b, starts[b] <= i < starts[b + 1], is at b * kPackBlock + offsets[i].
struct PackedList {
    const int32_t* starts;  // [blocks + 1]
    const int16_t* offsets;
    int64_t blocks;
};

SPARSEFT_HOST_DEVICE PackedList packed_list(const Selection& at) {
    const int64_t blocks = (at.numel + kPackBlock - 1) / kPackBlock;
    const int32_t* const starts = static_cast<const int32_t*>(at.indices);
    return {starts, reinterpret_cast<const int16_t*>(starts + blocks + 1), blocks};
}

// Build a Selection without data. The indices themselves are not looked at: a Device's `check_indices` does that, for
// all lists of a call.
inline Selection select(const Argument& argument, const Tensor& indices, int64_t numel, const Place& place) {
    check_dtype(argument, indices, kIndexTypes);
    check_contiguous(argument, indices);
    check_device(argument, indices, place);
    Selection at{};
    at.indices = indices.data_ptr();
    at.numel = numel;
    at.k = indices.numel();
    at.place = static_cast<int32_t>(argument.position);
    const ScalarType dtype = dtype_of(indices);
    at.form = dtype == ScalarType::Long ? IndexForm::kInt64 : IndexForm::kInt32;
    if (dtype != ScalarType::Short) return at;

    at.form = IndexForm::kPacked;
    const int64_t header = 2 * (packed_list(at).blocks + 1);
    at.k -= header;
    check(at.k >= 0, argument, " must, packed as int16, have ", header, " numbers or more for a tensor of ", numel,
          " elements, got ", indices.numel(), "; use a mask made for this model");
    check(reinterpret_cast<uintptr_t>(at.indices) % alignof(int32_t) == 0, argument,
          " must, packed as int16, begin at a multiple of 4 bytes, got a view that does not; call .clone() first");
    return at;
}

// Build the Selection of a tensor from its entry in an op's list `indices`.
inline Selection select(const Argument& tensor_argument, const Tensor& tensor, const Tensor& indices,
                        const Place& place) {
    const int64_t numel = tensor.numel();
    Selection at = select({tensor_argument.op, "indices", tensor_argument.position}, indices, numel, place);
    at.data = tensor.data_ptr();
    at.element_size = static_cast<int8_t>(tensor.element_size());
    return at;
}

}  // namespace sparseft
