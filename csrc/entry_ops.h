// The ops that move selected entries, as the dispatcher calls them, for any device. `Device`, constructed from the
// first tensor, has `check_indices(op, tensors, exchanges)`, `gather(exchanges)` and `swap(exchanges)`. What the ops
// compute: sparseft/reference.py.
#pragma once

#include <vector>

#include <torch/csrc/stable/ops.h>

#include "selection.h"

namespace sparseft {

// Entries of a tensor, and a compact block of the same dtype, [k], that receives or replaces their values.
struct Exchange {
    Selection at;
    void* values;
};

template <class Device>
std::vector<Tensor> gather(const std::vector<Tensor>& tensors, const std::vector<Tensor>& indices) {
    check_length({"gather", "indices"}, indices, tensors.size());
    std::vector<Tensor> results, kept_alive;
    std::vector<Exchange> exchanges;
    for (size_t i = 0; i < tensors.size(); ++i) {
        const Argument argument{"gather", "tensors", static_cast<int64_t>(i)};
        check_device(argument, tensors[i], tensors[0]);
        kept_alive.push_back(tensors[i].is_contiguous() ? tensors[i] : torch::stable::contiguous(tensors[i]));
        const Selection at = select(argument, kept_alive.back(), indices[i], tensors[0]);
        results.push_back(torch::stable::new_empty(tensors[i], {at.k}));
        if (at.k > 0) exchanges.push_back({at, results.back().data_ptr()});
    }
    if (exchanges.empty()) return results;
    const Device device(tensors[0]);
    device.check_indices("gather", "tensors", exchanges);
    device.gather(exchanges);
    return results;
}

template <class Device>
void delta_swap_(const std::vector<Tensor>& params, const std::vector<Tensor>& indices,
                 const std::vector<Tensor>& values) {
    check_length({"delta_swap_", "indices"}, indices, params.size());
    check_length({"delta_swap_", "values"}, values, params.size());
    std::vector<Exchange> exchanges;
    for (size_t i = 0; i < params.size(); ++i) {
        const Argument param{"delta_swap_", "params", static_cast<int64_t>(i)};
        const Argument value{"delta_swap_", "values", static_cast<int64_t>(i)};
        check_device(param, params[i], params[0]);
        check_contiguous(param, params[i]);
        const Selection at = select(param, params[i], indices[i], params[0]);
        check_dtype(value, values[i], {params[i].scalar_type()});
        check_numel(value, values[i], at.k, "one a selected entry");
        check_contiguous(value, values[i]);
        check_device(value, values[i], params[0]);
        if (at.k > 0) exchanges.push_back({at, values[i].data_ptr()});
    }
    if (exchanges.empty()) return;
    const Device device(params[0]);
    device.check_indices("delta_swap_", "params", exchanges);
    device.swap(exchanges);
}

}  // namespace sparseft
