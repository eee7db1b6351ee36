// The optimizer ops as the dispatcher calls them, for any device. `Device` says where the work is done: constructed
// from the first parameter, it has `check_indices(op, tensors, parameters)` and `step(rule, work, options)`, which
// counts the step too. What the ops compute: sparseft/reference.py.
#pragma once

#include <optional>
#include <vector>

#include "optimizer_step.h"
#include "update_rules.h"

namespace sparseft {

using TensorList = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;
using MaybeTensorList = std::optional<TensorList>;
using MaybeIntegers = std::optional<std::vector<int64_t>>;

template <class Device, class Rule>
void optimizer_op(const Rule& rule, const StepArguments& arguments, bool stateless, double lr, bool maximize,
                  const MaybeTensor& lr_tensor, const MaybeTensor& grad_scale, const MaybeTensor& found_inf) {
    if (arguments.params.empty()) return;
    const StepWork work = step_work(arguments, stateless);
    const StepOptions options = step_options(arguments, lr, maximize, lr_tensor, grad_scale, found_inf);
    const Device device(arguments.params[0]);
    device.check_indices(arguments.op, "params", work.parameters);
    device.step(rule, work, options);
}

template <class Device>
void adamw_(const TensorList& params, const TensorList& grads, const TensorList& indices, const TensorList& exp_avgs,
            const TensorList& exp_avg_sqs, const TensorList& masters, const TensorList& steps, double beta1,
            double beta2, double eps, double lr, double weight_decay, bool maximize, const MaybeTensorList& pretrained,
            const MaybeIntegers& seeds, const MaybeTensorList& scales, const MaybeTensor& lr_tensor,
            const MaybeTensor& grad_scale, const MaybeTensor& found_inf) {
    StepArguments arguments{"adamw_", params, grads, indices, masters, steps, pretrained, seeds, scales};
    arguments.states = {{"exp_avgs", &exp_avgs}, {"exp_avg_sqs", &exp_avg_sqs}};
    optimizer_op<Device>(AdamW{beta1, beta2, eps, weight_decay}, arguments, false, lr, maximize, lr_tensor, grad_scale,
                         found_inf);
}

template <class Device>
void lion_(const TensorList& params, const TensorList& grads, const TensorList& indices, const TensorList& exp_avgs,
           const TensorList& masters, const TensorList& steps, double beta1, double beta2, double lr,
           double weight_decay, bool maximize, const MaybeTensorList& pretrained, const MaybeIntegers& seeds,
           const MaybeTensorList& scales, const MaybeTensor& lr_tensor, const MaybeTensor& grad_scale,
           const MaybeTensor& found_inf) {
    StepArguments arguments{"lion_", params, grads, indices, masters, steps, pretrained, seeds, scales};
    arguments.states = {{"exp_avgs", &exp_avgs}};
    optimizer_op<Device>(Lion{beta1, beta2, weight_decay}, arguments, false, lr, maximize, lr_tensor, grad_scale,
                         found_inf);
}

template <class Device>
void sgd_(const TensorList& params, const TensorList& grads, const TensorList& indices,
          const TensorList& momentum_buffers, const TensorList& masters, const TensorList& steps, double momentum,
          double dampening, bool nesterov, double lr, double weight_decay, bool maximize,
          const MaybeTensorList& pretrained, const MaybeIntegers& seeds, const MaybeTensorList& scales,
          const MaybeTensor& lr_tensor, const MaybeTensor& grad_scale, const MaybeTensor& found_inf) {
    StepArguments arguments{"sgd_", params, grads, indices, masters, steps, pretrained, seeds, scales};
    arguments.states = {{"momentum_buffers", &momentum_buffers}};
    optimizer_op<Device>(SGD{momentum, dampening, weight_decay, nesterov}, arguments, momentum == 0, lr, maximize,
                         lr_tensor, grad_scale, found_inf);
}

}  // namespace sparseft
