// The loop of every optimizer on the CPU. Selected entries go through it in blocks that stay in the first-level cache:
// gather gradients and weights as fp32, apply the rule to the block in vector registers, scatter the weights.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../optimizer_step.h"
#include "check_indices.h"
#include "convert.h"
#include "entries.h"
#include "low_bits.h"
#include "simd.h"
#include "work_list.h"

namespace sparseft {

using StepEntries = BlockOf<ParameterStep>;

constexpr int64_t kGrainEntries = 4096;  // below, a second thread costs more than it saves

struct alignas(64) Block {
    float weight[kBlockEntries];
    float grad[kBlockEntries];
    float anchor[kBlockEntries];  // what decay pulls to
    float states[kMaxStates][kBlockEntries];
    float stored[kBlockEntries];  // 16-bit weights as the tensor stores them, in half the space
    float stored_grad[kBlockEntries];
    float rounded[kBlockEntries];
    uint32_t random[kBlockEntries];
};
static_assert(kBlockEntries == kCodeBlock, "a block has one scale");

template <class Rule>
SPARSEFT_SIMD void update_block(const typename Rule::Coefficients c, int64_t n, const float* __restrict grad,
                                const float* __restrict anchor, float* __restrict weight, float* __restrict state0,
                                float* __restrict state1) {
    for (int64_t i = 0; i < n; ++i) {
        if constexpr (Rule::kStates == 1) {
            float state[1] = {state0[i]};
            Rule::update(c, grad[i], anchor[i], weight[i], state);
            state0[i] = state[0];
        } else {
            float state[2] = {state0[i], state1[i]};
            Rule::update(c, grad[i], anchor[i], weight[i], state);
            state0[i] = state[0];
            state1[i] = state[1];
        }
    }
}

inline SPARSEFT_SIMD void divide(float* __restrict values, int64_t n, float divisor) {
    for (int64_t i = 0; i < n; ++i) values[i] /= divisor;
}

// Take the master of each weight that still rounds from it. One that does not was changed from outside, by a delta
// swapped in, say: there the weight wins.
inline SPARSEFT_SIMD void prefer_master(const float* __restrict master, const float* __restrict rounded, int64_t n,
                                        float* __restrict weight) {
    for (int64_t i = 0; i < n; ++i) weight[i] = rounded[i] == weight[i] ? master[i] : weight[i];
}

// Where all entries of a parameter are selected, its weights are read and written where they lie.
inline bool is_whole(const ParameterStep& p) { return p.at.k == p.at.numel; }

inline void* weights_from(const ParameterStep& p, int64_t begin) {
    return static_cast<char*>(p.at.data) + begin * p.at.element_size;
}

inline int grad_size(const ParameterStep& p) { return p.grad_dtype == ScalarType::Float ? 4 : 2; }

// Fill the block's weights and gradients, as fp32 and as the rule wants them.
inline void load_block(const StepEntries& entries, const StepEntries& ahead, float divisor, Block& block) {
    const ParameterStep& p = *entries.item;
    const ParameterStep& next = *ahead.item;
    const int64_t begin = entries.begin, n = entries.n;
    // fp32 is gathered to where it is wanted
    void* const gathered_weight = p.dtype == ScalarType::Float ? block.weight : block.stored;
    void* const gathered_grad = p.grad_dtype == ScalarType::Float ? block.grad : block.stored_grad;
    const void* weight = gathered_weight;
    const void* grad = gathered_grad;
    const Lines weights_ahead(next.at.data, next.at.element_size, ahead);
    if (p.compact_grad) {
        grad = static_cast<const char*>(p.grad) + begin * grad_size(p);
        if (is_whole(p)) {
            weight = weights_from(p, begin);
        } else {
            gather_entries(entries, p.at.data, p.at.element_size, gathered_weight, weights_ahead);
        }
    } else {
        const Lines grads_ahead(next.grad, grad_size(next), ahead);
        gather_two(entries, p.at.data, p.at.element_size, gathered_weight, weights_ahead, p.grad, grad_size(p),
                   gathered_grad, next.compact_grad ? weights_ahead : grads_ahead);
    }
    if (grad != block.grad) widen(p.grad_dtype, grad, n, block.grad);
    if (divisor != 1) divide(block.grad, n, divisor);
    if (weight != block.weight) widen(p.dtype, weight, n, block.weight);
    if (p.pretrained) {
        widen(p.dtype, static_cast<const char*>(p.pretrained) + begin * p.at.element_size, n, block.anchor);
    }
    if (p.master) {
        narrow(p.dtype, p.master + begin, n, block.stored);
        widen(p.dtype, block.stored, n, block.rounded);
        prefer_master(p.master + begin, block.rounded, n, block.weight);
    }
}

// Where state s of entries from `begin` on has its codes, and the scale of those.
inline std::pair<uint8_t*, float*> codes_and_scale(const ParameterStep& p, int s, int64_t begin) {
    float* const scale = p.scales + s * code_blocks(p.at.k) + begin / kCodeBlock;
    return {static_cast<uint8_t*>(p.states[s]) + begin, scale};
}

inline void load_codes(const ParameterStep& p, int s, int64_t begin, int64_t n, float* values) {
    const auto [codes, scale] = codes_and_scale(p, s, begin);
    s == 0 ? decode<false>(codes, *scale, n, values) : decode<true>(codes, *scale, n, values);
}

inline void store_codes(const ParameterStep& p, int s, int64_t begin, int64_t n, const Block& block) {
    const auto [codes, scale] = codes_and_scale(p, s, begin);
    const float* const values = block.states[s];
    *scale = largest_magnitude(values, n);
    s == 0 ? encode<false>(values, *scale, block.random, n, codes)
           : encode<true>(values, *scale, block.random, n, codes);
}

// Round the block's weights to numbers of the parameter's dtype, which storing them then keeps.
inline void round_weights(const ParameterStep& p, int64_t n, Block& block) {
    if (p.dtype == ScalarType::BFloat16) return round_to_bfloat16(block.random, n, block.weight);
    round_to_half(block.random, n, block.weight);
}

inline void store_weight(const StepEntries& entries, Block& block) {
    const ParameterStep& p = *entries.item;
    if (p.stochastic) round_weights(p, entries.n, block);
    if (is_whole(p)) {
        narrow(p.dtype, block.weight, entries.n, weights_from(p, entries.begin));
    } else {
        const bool wide = p.dtype == ScalarType::Float;
        if (!wide) narrow(p.dtype, block.weight, entries.n, block.stored);
        scatter_entries(entries, p.at.data, p.at.element_size, wide ? block.weight : block.stored);
    }
    if (p.master) std::memcpy(p.master + entries.begin, block.weight, entries.n * sizeof(float));
}

template <class Rule>
void step_block(const typename Rule::Coefficients& coefficients, float divisor, const StepEntries& entries,
                const StepEntries& ahead, Block& block) {
    const ParameterStep& p = *entries.item;
    const int64_t begin = entries.begin, n = entries.n;
    load_block(entries, ahead, divisor, block);
    // a state that the options do not need is a dummy that stays in the block
    float* states[kMaxStates];
    for (int s = 0; s < kMaxStates; ++s) {
        const bool in_place = p.states[s] && !p.scales;
        states[s] = in_place ? static_cast<float*>(p.states[s]) + begin : block.states[s];
    }
    const int coded = p.scales ? Rule::kStates : 0;
    for (int s = 0; s < coded; ++s) load_codes(p, s, begin, n, states[s]);
    update_block<Rule>(coefficients, n, block.grad, block.anchor, block.weight, states[0], states[1]);
    if (p.stochastic || p.scales) fill_random(entries.positions, n, random_key(p.seed, *p.count), block.random);
    for (int s = 0; s < coded; ++s) store_codes(p, s, begin, n, block);
    store_weight(entries, block);
}

// Where optimizer_ops.h has a step done.
struct CpuOptimizer {
    explicit CpuOptimizer(const Tensor&) {}

    void check_indices(const char* op, const char* tensors, const std::vector<ParameterStep>& parameters) const {
        sparseft::check_indices(op, tensors, parameters);
    }

    template <class Rule>
    void step(const Rule& rule, const StepWork& step_work, const StepOptions& options) const {
        if (options.found_inf && *options.found_inf != 0) return;
        for (float* const count : step_work.counts) *count += 1;
        const std::vector<ParameterStep>& parameters = step_work.parameters;
        const double lr = options.lr_tensor ? *options.lr_tensor : options.lr;
        const float scale = options.grad_scale ? *options.grad_scale : 1;
        const float divisor = options.maximize ? -scale : scale;

        const WorkList work(parameters.size(), kBlockEntries, [&](size_t i) { return parameters[i].at.k; });
        work.parallel(kGrainEntries, [&](const auto& for_each_piece) {
            Block block;
            std::memset(block.states, 0, sizeof block.states);
            std::memset(block.anchor, 0, sizeof block.anchor);
            float count = std::numeric_limits<float>::quiet_NaN();  // differs from every count
            typename Rule::Coefficients coefficients{};
            for_each_block(parameters, for_each_piece, [&](const StepEntries& entries, const StepEntries& ahead) {
                if (*entries.item->count != count) {
                    count = *entries.item->count;
                    coefficients = rule.coefficients(lr, count);
                }
                step_block<Rule>(coefficients, divisor, entries, ahead, block);
            });
        });
    }
};

}  // namespace sparseft
