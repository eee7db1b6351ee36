// What every optimizer op is called with, checked and turned into plain pointers for the CPU loop or the CUDA kernel.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "low_bits.h"
#include "selection.h"

namespace sparseft {

constexpr int kMaxStates = 2;

// One parameter of a step. The states are fp32 [k] or, where there are scales, codes [k] of low_bits.h; one that the
// options do not need is null, and so is `master` where there is none.
struct ParameterStep {
    Selection at;
    const void* grad;
    float* master;
    const void* pretrained;  // [k], what decay pulls to, in the parameter's dtype; null: zero
    void* states[kMaxStates];
    float* scales;       // a row a state, null for states in fp32
    const float* count;  // of steps, this one included when it is read
    uint32_t seed;       // mixed
    ScalarType dtype;
    ScalarType grad_dtype;
    bool compact_grad;  // [k] instead of the parameter's shape
    bool stochastic;    // weights are rounded so: they have fewer bits than fp32, and no master
};

// What a step works on, checked.
struct StepWork {
    std::vector<ParameterStep> parameters;  // those with selected entries
    std::vector<float*> counts;             // of steps before this one, of every parameter
    std::vector<Tensor> copies;             // of gradients that were not contiguous, alive until the step is done
};

// What is the same for all parameters of a step. The pointers, each to one fp32 value on the parameters' device, may
// be null.
struct StepOptions {
    double lr;
    bool maximize;
    const float* lr_tensor;
    const float* grad_scale;
    const float* found_inf;
};

// An optimizer op's arguments, as they come. `states` pairs each list of states with its name.
struct StepArguments {
    const char* op;
    const std::vector<Tensor>& params;
    const std::vector<Tensor>& grads;
    const std::vector<Tensor>& indices;
    const std::vector<Tensor>& masters;
    const std::vector<Tensor>& steps;
    const std::optional<std::vector<Tensor>>& pretrained;
    const std::optional<std::vector<int64_t>>& seeds;
    const std::optional<std::vector<Tensor>>& scales;
    std::vector<std::pair<const char*, const std::vector<Tensor>*>> states = {};
};

// The address of one fp32 value.
inline float* scalar(const Argument& argument, const Tensor& tensor, const Place& place) {
    check_dtype(argument, tensor, {ScalarType::Float});
    check_numel(argument, tensor, 1, "a 0-d tensor");
    check_device(argument, tensor, place);
    return static_cast<float*>(tensor.data_ptr());
}

// Values beside the selected entries, or null for an empty tensor where that is allowed.
inline void* per_entry(const Argument& argument, const Tensor& tensor, ScalarType dtype, int64_t k, bool may_be_empty,
                       const Place& place) {
    if (may_be_empty && tensor.numel() == 0) return nullptr;
    check_dtype(argument, tensor, {dtype});
    check_numel(argument, tensor, k, "one a selected entry");
    check_contiguous(argument, tensor);
    check_device(argument, tensor, place);
    return tensor.data_ptr();
}

// The scales of the codes that the states of parameter i are, or null.
inline float* scales_of_codes(const StepArguments& a, int64_t i, int64_t k, const Place& place) {
    if (!a.scales) return nullptr;
    const Argument argument{a.op, "scales", i};
    const Tensor& scales = (*a.scales)[i];
    check_dtype(argument, scales, {ScalarType::Float});
    check_numel(argument, scales, a.states.size() * code_blocks(k), "one a state and 256 entries");
    check_contiguous(argument, scales);
    check_device(argument, scales, place);
    return static_cast<float*>(scales.data_ptr());
}

// The values that decay pulls the weights of parameter i to, or null.
inline const void* decay_target(const StepArguments& a, int64_t i, int64_t k, const Place& place) {
    if (!a.pretrained) return nullptr;
    return per_entry({a.op, "pretrained", i}, (*a.pretrained)[i], dtype_of(a.params[i]), k, false, place);
}

// The gradient's data, contiguous; `copies` keeps what had to be made so.
inline const void* contiguous_data(const Tensor& grad, std::vector<Tensor>& copies) {
    if (grad.is_contiguous()) return grad.data_ptr();
    copies.push_back(torch::stable::contiguous(grad));
    return copies.back().data_ptr();
}

// Check parameter i of a step and add it to `work`.
inline void add_parameter(const StepArguments& a, size_t i, bool stateless, const Place& place, StepWork& work) {
    const auto at = [&](const char* name) { return Argument{a.op, name, static_cast<int64_t>(i)}; };
    const Tensor& param = a.params[i];
    const Tensor& grad = a.grads[i];
    check_dtype(at("params"), param, kFloatTypes);
    check_contiguous(at("params"), param);
    check_device(at("params"), param, place);
    check_dtype(at("grads"), grad, kFloatTypes);
    check_device(at("grads"), grad, place);

    ParameterStep step{};
    step.at = select(at("params"), param, a.indices[i], place);
    const int64_t k = step.at.k;
    step.compact_grad = grad.numel() == k;
    check(step.compact_grad || grad.numel() == step.at.numel, at("grads"), " must have the ", step.at.numel,
          " elements of its parameter or the ", k, " of its indices, got ", grad.numel());
    step.grad = contiguous_data(grad, work.copies);
    step.dtype = dtype_of(param);
    step.grad_dtype = dtype_of(grad);
    const ScalarType state_dtype = a.scales ? ScalarType::Byte : ScalarType::Float;
    for (size_t s = 0; s < a.states.size(); ++s) {
        const auto& [name, list] = a.states[s];
        step.states[s] = per_entry(at(name), (*list)[i], state_dtype, k, stateless, place);
    }
    step.pretrained = decay_target(a, i, k, place);
    step.scales = scales_of_codes(a, i, k, place);
    step.master = static_cast<float*>(per_entry(at("masters"), a.masters[i], ScalarType::Float, k, true, place));
    step.seed = a.seeds ? mixed_seed((*a.seeds)[i]) : 0;
    step.stochastic = a.seeds && !step.master && step.dtype != ScalarType::Float;
    float* const count = scalar(at("steps"), a.steps[i], place);
    step.count = count;
    work.counts.push_back(count);
    if (k > 0) work.parameters.push_back(step);
}

// Check all lists of a step, except where the indices point. `stateless`: the options need no state, it may be empty.
inline StepWork step_work(const StepArguments& a, bool stateless) {
    const size_t n = a.params.size();
    check_length({a.op, "grads"}, a.grads, n);
    check_length({a.op, "indices"}, a.indices, n);
    for (const auto& [name, list] : a.states) check_length({a.op, name}, *list, n);
    check_length({a.op, "masters"}, a.masters, n);
    check_length({a.op, "steps"}, a.steps, n);
    if (a.pretrained) check_length({a.op, "pretrained"}, *a.pretrained, n);
    check(!a.seeds || a.seeds->size() == n, Argument{a.op, "seeds"}, " must hold one number for each of the ", n,
          " parameters, got ", a.seeds ? a.seeds->size() : 0);
    if (a.scales) {
        check_length({a.op, "scales"}, *a.scales, n);
        check(
            a.seeds && !stateless, Argument{a.op, "scales"},
            " are for states in 8 bits, which are rounded at random; give seeds, and leave scales out without states");
    }

    StepWork work;
    work.parameters.reserve(n);
    work.counts.reserve(n);
    const Place place = a.params[0];
    for (size_t i = 0; i < n; ++i) add_parameter(a, i, stateless, place, work);
    return work;
}

inline StepOptions step_options(const StepArguments& a, double lr, bool maximize,
                                const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& grad_scale,
                                const std::optional<Tensor>& found_inf) {
    const auto address = [&](const char* name, const std::optional<Tensor>& tensor) {
        return tensor.has_value() ? scalar({a.op, name}, *tensor, a.params[0]) : nullptr;
    };
    return {lr, maximize, address("lr_tensor", lr_tensor), address("grad_scale", grad_scale),
            address("found_inf", found_inf)};
}

}  // namespace sparseft
