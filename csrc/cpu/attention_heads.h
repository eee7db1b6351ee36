// What attention reads and writes on the CPU: heads of samples, [tokens, features] each, of tensors [N, H, T, D].
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "attention_rows.h"
#include "panels.h"
#include "transpose_floats.h"

namespace sparseft {

using torch::stable::Tensor;

// One head of one sample, whose features lie together.
struct Head {
    float* data;
    int64_t tokens, features, stride;

    float* at(int64_t token) const { return data + token * stride; }

    Matrix by_token(int64_t first, int64_t count) const {
        return {
            reinterpret_cast<const char*>(at(first)), count, features, stride, 1, sizeof(float), ScalarType::Float};
    }

    Matrix by_feature() const {
        return {reinterpret_cast<const char*>(data), features, tokens, 1, stride, sizeof(float), ScalarType::Float};
    }

    // `count` tokens as rows, one a feature, with zeros up to kRowQueries.
    void read(int64_t first, int64_t count, std::vector<Row>& rows) const {
        rows.resize(features);
        if (count < kRowQueries) std::fill(rows.begin(), rows.end(), Row{});
        transpose(at(first), stride, count, features, rows[0].of, kRowQueries);
    }

    void write(int64_t first, int64_t count, const Row* rows) const {
        transpose(rows[0].of, kRowQueries, features, count, at(first), stride);
    }
};

class Heads {
  public:
    explicit Heads(const Tensor& tensor)
        : tensor_(tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor)),
          data_(static_cast<float*>(tensor_.data_ptr())) {
        for (int64_t dim = 0; dim < 4; ++dim) sizes_[dim] = tensor_.size(dim), strides_[dim] = tensor_.stride(dim);
    }

    // Of these sizes, with nothing in it. Tokens hold all their heads one after the other, as the layers around
    // attention have them.
    static Heads empty(const Tensor& like, int64_t samples, int64_t heads, int64_t tokens, int64_t features) {
        return Heads(
            torch::stable::transpose(torch::stable::new_empty(like, {samples, tokens, heads, features}), 1, 2));
    }

    Head operator()(int64_t sample, int64_t head) const {
        return {data_ + sample * strides_[0] + head * strides_[1], tokens(), features(), strides_[2]};
    }

    int64_t samples() const { return sizes_[0]; }
    int64_t heads() const { return sizes_[1]; }
    int64_t tokens() const { return sizes_[2]; }
    int64_t features() const { return sizes_[3]; }
    const Tensor& tensor() const { return tensor_; }

  private:
    Tensor tensor_;
    float* data_;
    int64_t sizes_[4], strides_[4];
};

// What queries see: which keys, and what is added to the scores of one head.
struct View {
    bool causal;
    const float* bias;  // or null
    int64_t query_stride, key_stride;

    // How many keys are seen by one of the queries first, first + 1, ...
    int64_t seen(int64_t first, int64_t keys) const { return causal ? std::min(keys, first + kRowQueries) : keys; }
};

// Of all heads. bias: [N, H, queries, keys].
class Views {
  public:
    Views(bool causal, const std::optional<Tensor>& bias) : causal_(causal) {
        if (!bias) return;
        bias_ = static_cast<const float*>(bias->data_ptr());
        for (int64_t dim = 0; dim < 4; ++dim) strides_[dim] = bias->stride(dim);
    }

    View operator()(int64_t sample, int64_t head) const {
        const float* const bias = bias_ ? bias_ + sample * strides_[0] + head * strides_[1] : nullptr;
        return {causal_, bias, strides_[2], strides_[3]};
    }

  private:
    bool causal_;
    const float* bias_ = nullptr;
    int64_t strides_[4] = {};
};

}  // namespace sparseft
