// The kernel that moves selected entries on CUDA, as bytes: no dtype is interpreted, so none is changed.
#pragma once

#include <vector>

#include "../entry_ops.h"
#include "multi_tensor.cuh"

namespace sparseft {

// Gather: values = entries. Swap: values and entries change places.
template <bool kSwap, class Bits>
__device__ __forceinline__ void move_entries(const Exchange& exchange, const Chunk& chunk) {
    Bits* const data = static_cast<Bits*>(exchange.at.data);
    Bits* const values = static_cast<Bits*>(exchange.values);
    const Positions position(exchange.at, chunk);
    for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kThreads) {
        const int64_t where = position(i);
        const Bits entry = data[where];
        if constexpr (kSwap) data[where] = values[i];
        values[i] = entry;
    }
}

template <bool kSwap>
__global__ void __launch_bounds__(kThreads) entries_kernel(const __grid_constant__ Table<Exchange> table) {
    const Chunk chunk = chunk_of_block(table);
    const Exchange& exchange = table.items[chunk.item];
    switch (exchange.at.element_size) {
        case 1:
            return move_entries<kSwap, uint8_t>(exchange, chunk);
        case 2:
            return move_entries<kSwap, uint16_t>(exchange, chunk);
        case 4:
            return move_entries<kSwap, uint32_t>(exchange, chunk);
        case 8:
            return move_entries<kSwap, uint64_t>(exchange, chunk);
        default:
            return move_entries<kSwap, uint4>(exchange, chunk);
    }
}

// Where entry_ops.h has entries moved.
class CudaEntries {
  public:
    explicit CudaEntries(const Tensor& tensor) : launcher_(tensor) {}

    // It would have to wait for the GPU: kernels trap at an index outside its tensor instead.
    void check_indices(const char*, const char*, const std::vector<Exchange>&) const {}

    void gather(const std::vector<Exchange>& exchanges) const { launcher_.launch(exchanges, entries_kernel<false>); }

    void swap(const std::vector<Exchange>& exchanges) const { launcher_.launch(exchanges, entries_kernel<true>); }

  private:
    Launcher launcher_;
};

}  // namespace sparseft
