// The kernels of every optimizer on CUDA. Step count, learning rate and loss scale are read on the device, so a step
// neither synchronises nor changes when it is replayed from a CUDA graph.
#pragma once

#include <algorithm>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../optimizer_step.h"
#include "multi_tensor.cuh"

namespace sparseft {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Loading bits first and reading them as numbers later keeps all loads of an entry under way at once. The dtype is the
// same for a whole block, so that one kernel serves lists of mixed dtypes at little cost.
__device__ __forceinline__ uint32_t load_bits(const void* data, ScalarType dtype, int64_t i) {
    return dtype == ScalarType::Float ? static_cast<const uint32_t*>(data)[i] : static_cast<const uint16_t*>(data)[i];
}

__device__ __forceinline__ float as_number(uint32_t bits, ScalarType dtype) {
    if (dtype == ScalarType::Float) return __uint_as_float(bits);
    if (dtype == ScalarType::BFloat16) return BFloat16(static_cast<uint16_t>(bits), BFloat16::from_bits());
    return Half(static_cast<uint16_t>(bits), Half::from_bits());
}

__device__ __forceinline__ void store(void* data, ScalarType dtype, int64_t i, float value) {
    if (dtype == ScalarType::BFloat16) {
        static_cast<BFloat16*>(data)[i] = value;
    } else if (dtype == ScalarType::Half) {
        static_cast<Half*>(data)[i] = value;
    } else {
        static_cast<float*>(data)[i] = value;
    }
}

__device__ __forceinline__ float rounded(float value, ScalarType dtype) {
    if (dtype == ScalarType::BFloat16) return static_cast<BFloat16>(value);
    if (dtype == ScalarType::Half) return static_cast<Half>(value);
    return value;
}

__device__ __forceinline__ float stochastically_rounded(float value, ScalarType dtype, uint32_t random) {
    return dtype == ScalarType::BFloat16 ? round_to_bfloat16(value, random) : round_to_half(value, random);
}

// The largest magnitude that the threads of a block hold, NaN if there is one.
__device__ __forceinline__ float largest_magnitude(float value) {
    __shared__ uint32_t of_warps[kThreads / 32];
    const uint32_t of_warp = __reduce_max_sync(0xffffffffu, bits_of(value) & 0x7fffffffu);
    __syncthreads();  // until nobody reads any more what was there
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = of_warp;
    __syncthreads();
    uint32_t largest = 0;
    for (const uint32_t one : of_warps) largest = max(largest, one);
    return from_bits(largest);
}

// States of entry i in 8 bits. A block of threads works on entries with one scale.
static_assert(kThreads == kCodeBlock && kEntriesPerBlock % kCodeBlock == 0, "a block of threads has one scale");

template <bool kSquares>
__device__ __forceinline__ float load_code(const ParameterStep& p, int s, int64_t i) {
    const float scale = p.scales[s * code_blocks(p.at.k) + i / kCodeBlock];
    return Code<kSquares>::decode(static_cast<const uint8_t*>(p.states[s])[i], scale);
}

template <bool kSquares>
__device__ __forceinline__ void store_code(const ParameterStep& p, int s, int64_t i, bool exists, float value,
                                           uint32_t random) {
    const float scale = largest_magnitude(value);
    if (!exists) return;
    if (i % kCodeBlock == 0) p.scales[s * code_blocks(p.at.k) + i / kCodeBlock] = scale;
    const uint32_t code = Code<kSquares>::encode(value, scale, random_of_state(random, s));
    static_cast<uint8_t*>(p.states[s])[i] = static_cast<uint8_t>(code);
}

// Update entry i, which is at `where`. In 8 bits, all threads of a block come here together, some for an entry that
// others write.
template <class Rule, bool kLowBits>
__device__ __forceinline__ void update_entry(const ParameterStep& p, const typename Rule::Coefficients& coefficients,
                                             float divisor, uint32_t key, int64_t i, int64_t where, bool exists) {
    const uint32_t grad_bits = load_bits(p.grad, p.grad_dtype, p.compact_grad ? i : where);
    const uint32_t weight_bits = load_bits(p.at.data, p.dtype, where);
    const float master = p.master ? p.master[i] : 0;
    const uint32_t anchor_bits = p.pretrained ? load_bits(p.pretrained, p.dtype, i) : 0;
    float states[Rule::kStates];
    for (int s = 0; s < Rule::kStates; ++s) {
        if constexpr (kLowBits) {
            states[s] = s == 0 ? load_code<false>(p, s, i) : load_code<true>(p, s, i);
        } else {
            states[s] = p.states[s] ? static_cast<const float*>(p.states[s])[i] : 0;
        }
    }

    const float grad = as_number(grad_bits, p.grad_dtype) / divisor;
    float weight = as_number(weight_bits, p.dtype);
    // a weight that does not round from its master was changed from outside: the weight wins
    if (p.master && rounded(master, p.dtype) == weight) weight = master;
    Rule::update(coefficients, grad, as_number(anchor_bits, p.dtype), weight, states);
    const uint32_t random = kLowBits || p.stochastic ? random_bits(key, where) : 0;
    for (int s = 0; s < Rule::kStates; ++s) {
        if constexpr (kLowBits) {
            s == 0 ? store_code<false>(p, s, i, exists, states[s], random)
                   : store_code<true>(p, s, i, exists, states[s], random);
        } else if (p.states[s]) {
            static_cast<float*>(p.states[s])[i] = states[s];
        }
    }
    if (!exists) return;
    if (p.stochastic) weight = stochastically_rounded(weight, p.dtype, random);
    store(p.at.data, p.dtype, where, weight);
    if (p.master) p.master[i] = weight;
}

// Addresses of step counts, a few kilobytes of arguments of one launch.
struct Counts {
    static constexpr int kCapacity = 500;

    float* counts[kCapacity];
    int size;
};

// Before optimizer_kernel, whose blocks only read the counts: none can see one that another has already changed.
static __global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ Counts table, const float* const found_inf) {
    if (found_inf && *found_inf != 0) return;
    for (int i = threadIdx.x; i < table.size; i += kThreads) *table.counts[i] += 1;
}

template <class Rule, bool kLowBits>
__global__ void __launch_bounds__(kThreads)
    optimizer_kernel(const __grid_constant__ Table<ParameterStep> table, const Rule rule, const StepOptions options) {
    if (options.found_inf && *options.found_inf != 0) return;
    const Chunk chunk = chunk_of_block(table);
    const ParameterStep& p = table.items[chunk.item];
    __shared__ typename Rule::Coefficients coefficients;
    if (threadIdx.x == 0) {
        coefficients = rule.coefficients(options.lr_tensor ? *options.lr_tensor : options.lr, *p.count);
    }
    __syncthreads();
    const float scale = options.grad_scale ? *options.grad_scale : 1;
    const float divisor = options.maximize ? -scale : scale;
    const uint32_t key = random_key(p.seed, *p.count);
    const Positions position(p.at, chunk);
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += kThreads) {
        const int64_t i = begin + threadIdx.x;
        const bool exists = i < chunk.end;
        if (!kLowBits && !exists) break;
        const int64_t entry = exists ? i : chunk.end - 1;
        update_entry<Rule, kLowBits>(p, coefficients, divisor, key, entry, position(entry), exists);
    }
}

// Where optimizer_ops.h has a step done.
class CudaOptimizer {
  public:
    explicit CudaOptimizer(const Tensor& param) : launcher_(param) {}

    // It would have to wait for the GPU: kernels trap at an index outside its tensor instead.
    void check_indices(const char*, const char*, const std::vector<ParameterStep>&) const {}

    template <class Rule>
    void step(const Rule& rule, const StepWork& work, const StepOptions& options) const {
        count_step(work.counts, options.found_inf);
        const bool low_bits = !work.parameters.empty() && work.parameters[0].scales;
        launcher_.launch(work.parameters, low_bits ? optimizer_kernel<Rule, true> : optimizer_kernel<Rule, false>,
                         rule, options);
    }

  private:
    void count_step(const std::vector<float*>& counts, const float* found_inf) const {
        for (size_t done = 0; done < counts.size();) {
            Counts some;
            some.size = static_cast<int>(std::min<size_t>(counts.size() - done, Counts::kCapacity));
            std::copy_n(counts.begin() + done, some.size, some.counts);
            done += some.size;
            launcher_.launch_block(count_kernel, some, found_inf);
        }
    }

    Launcher launcher_;
};

}  // namespace sparseft
