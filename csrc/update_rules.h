// The arithmetic of every optimizer, written once for CPU and CUDA. A rule holds the options of one call, in fp64 as
// Python has them (1 - beta2 would lose half its digits in fp32); coefficients() turns them and the step count into
// what update() applies, in fp32, to one selected entry; `anchor` is the value that decay pulls its weight to.
#pragma once

#include <cmath>

#include "host_device.h"

namespace sparseft {

// Go from `a` the share `t` of the way to `b`. The half of the interval from which to do so matters at its ends: all
// of the way must give b exactly.
SPARSEFT_HOST_DEVICE float interpolate(float a, float b, float t) {
    const float difference = b - a;
    return t < 0.5f ? a + t * difference : b - difference * (1 - t);
}

// Decoupled weight decay, arXiv 1711.05101, in torch.optim.AdamW's order of operations. State: exp_avg, exp_avg_sq.
struct AdamW {
    static constexpr int kStates = 2;

    double beta1, beta2, eps, weight_decay;

    struct Coefficients {
        float one_minus_beta1, beta2, one_minus_beta2, inverse_root_correction2, eps, pull, step_size;
    };

    SPARSEFT_HOST_DEVICE Coefficients coefficients(double lr, double step) const {
        const double correction1 = 1 - pow(beta1, step);
        const double correction2 = 1 - pow(beta2, step);
        return {static_cast<float>(1 - beta1),
                static_cast<float>(beta2),
                static_cast<float>(1 - beta2),
                static_cast<float>(1 / sqrt(correction2)),
                static_cast<float>(eps),
                static_cast<float>(lr * weight_decay),
                static_cast<float>(lr / correction1)};
    }

    static SPARSEFT_HOST_DEVICE void update(const Coefficients& c, float grad, float anchor, float& weight,
                                            float (&state)[kStates]) {
        auto& [exp_avg, exp_avg_sq] = state;
        exp_avg = interpolate(exp_avg, grad, c.one_minus_beta1);
        exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * (grad * grad);
        const float denominator = sqrtf(exp_avg_sq) * c.inverse_root_correction2 + c.eps;
        weight -= c.pull * (weight - anchor);
        weight -= c.step_size * (exp_avg / denominator);
    }
};

// arXiv 2302.06675, algorithm 2. State: exp_avg.
struct Lion {
    static constexpr int kStates = 1;

    double beta1, beta2, weight_decay;

    struct Coefficients {
        float lr, one_minus_beta1, one_minus_beta2, weight_decay;
    };

    SPARSEFT_HOST_DEVICE Coefficients coefficients(double lr, double) const {
        return {static_cast<float>(lr), static_cast<float>(1 - beta1), static_cast<float>(1 - beta2),
                static_cast<float>(weight_decay)};
    }

    static SPARSEFT_HOST_DEVICE void update(const Coefficients& c, float grad, float anchor, float& weight,
                                            float (&state)[kStates]) {
        auto& [exp_avg] = state;
        const float mean = interpolate(exp_avg, grad, c.one_minus_beta1);
        const float sign = mean > 0 ? 1 : mean < 0 ? -1 : mean;  // a NaN stays one
        exp_avg = interpolate(exp_avg, grad, c.one_minus_beta2);
        weight -= c.lr * (sign + c.weight_decay * (weight - anchor));
    }
};

// torch.optim.SGD. State: momentum_buffer, which step 1 sets to the gradient itself, undamped.
struct SGD {
    static constexpr int kStates = 1;

    double momentum, dampening, weight_decay;
    bool nesterov;

    struct Coefficients {
        float lr, weight_decay, momentum, undamped;
        bool first, nesterov;
    };

    SPARSEFT_HOST_DEVICE Coefficients coefficients(double lr, double step) const {
        return {static_cast<float>(lr),
                static_cast<float>(weight_decay),
                static_cast<float>(momentum),
                static_cast<float>(1 - dampening),
                step == 1,
                nesterov};
    }

    static SPARSEFT_HOST_DEVICE void update(const Coefficients& c, float grad, float anchor, float& weight,
                                            float (&state)[kStates]) {
        auto& [momentum_buffer] = state;
        grad += c.weight_decay * (weight - anchor);
        if (c.momentum != 0) {
            momentum_buffer = c.first ? grad : c.momentum * momentum_buffer + c.undamped * grad;
            grad = c.nesterov ? grad + c.momentum * momentum_buffer : momentum_buffer;
        }
        weight -= c.lr * grad;
    }
};

}  // namespace sparseft
