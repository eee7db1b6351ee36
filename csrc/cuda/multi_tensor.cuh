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

// How many of n sorted numbers are at most i. All threads of a block search together: one alone would wait for memory
// a dozen times in a row.
__device__ __forceinline__ int64_t count_up_to(const int32_t* sorted, int64_t n, int64_t i) {
    int64_t low = 0, high = n;
    while (low < high) {
        const int64_t step = (high - low + kThreads - 1) / kThreads, probe = low + threadIdx.x * step;
        const int64_t found = __syncthreads_count(probe < high && sorted[probe] <= i);
        const int64_t above = low + found * step;
        if (found > 0) low = above - step + 1;
        if (above < high) high = above;
    }
    return low;
}

// Where the selected entries of a chunk are. All threads of a block make one together.
class Positions {
  public:
    __device__ __forceinline__ Positions(const Selection& at, const Chunk& chunk) : at_(at) {
        if (at.form != IndexForm::kPacked) return;
        const PackedList list = packed_list(at);
        first_block_ = count_up_to(list.starts + 1, list.blocks - 1, chunk.begin);
        const int32_t* const behind = list.starts + 1 + first_block_;
        last_block_ = first_block_ + count_up_to(behind, list.blocks - 1 - first_block_, chunk.end - 1);
    }

    // The position of entry i of the chunk. One outside the tensor stops the kernel: it would write into foreign
    // memory.
    __device__ __forceinline__ int64_t operator()(int64_t i) const {
        const int64_t result = at_.form == IndexForm::kPacked  ? in_packed_list(i)
                               : at_.form == IndexForm::kInt64 ? static_cast<const int64_t*>(at_.indices)[i]
                                                               : static_cast<const int32_t*>(at_.indices)[i];
        if (result < 0 || result >= at_.numel) __trap();
        return result;
    }

  private:
    __device__ __forceinline__ int64_t in_packed_list(int64_t i) const {
        const PackedList list = packed_list(at_);
        int64_t low = first_block_, high = last_block_;
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (list.starts[middle] <= i) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        return low * kPackBlock + list.offsets[i];
    }

    const Selection& at_;
    int64_t first_block_ = 0, last_block_ = 0;
};

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
