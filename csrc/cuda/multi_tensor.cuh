// One launch for a whole list of tensors.
//
// The table of pointers travels in the kernel's arguments. They are copied at launch, so nothing is allocated, nothing
// is sent ahead and nothing has to stay alive: a launch can be captured in a CUDA graph and never waits. 32,764 bytes
// of arguments (CUDA 12.1 and up, compute capability 7.0 and up) hold some 270 parameters; longer lists take more
// launches. Blocks share selected entries, not tensors, whose k is very uneven: each finds its own by binary search.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "../selection.h"

namespace sparseft {

constexpr int kThreads = 256;
constexpr int64_t kEntriesPerBlock = 4096;      // enough to pay for the search and the coefficients of an optimizer
constexpr size_t kArgumentBytes = 32764 - 512;  // the rest is for a kernel's other arguments

// `Item` is what a kernel needs to know about one tensor; its member `at` is a Selection.
template <class Item>
struct Table {
    static constexpr int kCapacity = (kArgumentBytes - sizeof(int)) / (sizeof(Item) + sizeof(uint32_t));

    Item items[kCapacity];
    uint32_t first_block[kCapacity];
    int size;
};

// What a block works on: entries begin..end of one item.
struct Chunk {
    int item;
    int64_t begin, end;
};

template <class Item>
__device__ __forceinline__ Chunk chunk_of_block(const Table<Item>& table) {
    int low = 0, high = table.size - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (table.first_block[middle] <= blockIdx.x) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    const int64_t begin = (blockIdx.x - table.first_block[low]) * kEntriesPerBlock;
    const int64_t k = table.items[low].at.k;
    return {low, begin, begin + kEntriesPerBlock < k ? begin + kEntriesPerBlock : k};
}

// The position of selected entry i. One outside the tensor stops the kernel: it would write into foreign memory.
__device__ __forceinline__ int64_t position(const Selection& at, int64_t i) {
    const int64_t result =
        at.wide_indices ? static_cast<const int64_t*>(at.indices)[i] : static_cast<const int32_t*>(at.indices)[i];
    if (result < 0 || result >= at.numel) __trap();
    return result;
}

// Makes the tensors' device the current one while an op runs, and launches on its current stream.
class Launcher {
  public:
    explicit Launcher(const Tensor& on) : guard_(on.get_device_index()) {
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
        stream_ = static_cast<cudaStream_t>(stream);
    }

    // Call `kernel(arguments...)` in one block.
    template <class... Parameters, class... Arguments>
    void launch_block(void (*kernel)(Parameters...), const Arguments&... arguments) const {
        kernel<<<1, kThreads, 0, stream_>>>(arguments...);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
    }

    // Call `kernel(table, arguments...)` for all items, in as few launches as hold them.
    template <class Item, class... Parameters, class... Arguments>
    void launch(const std::vector<Item>& items, void (*kernel)(Table<Item>, Parameters...),
                const Arguments&... arguments) const {
        for (size_t done = 0; done < items.size();) {
            Table<Item> table;
            table.size = 0;
            int64_t blocks = 0;
            for (; done < items.size() && table.size < Table<Item>::kCapacity; ++done) {
                const int64_t more = (items[done].at.k + kEntriesPerBlock - 1) / kEntriesPerBlock;
                if (table.size > 0 && blocks + more > kMaxBlocks) break;
                table.items[table.size] = items[done];
                table.first_block[table.size++] = static_cast<uint32_t>(blocks);
                blocks += more;
            }
            kernel<<<static_cast<uint32_t>(blocks), kThreads, 0, stream_>>>(table, arguments...);
            STD_CUDA_KERNEL_LAUNCH_CHECK();
        }
    }

  private:
    static constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_ = nullptr;
};

}  // namespace sparseft
