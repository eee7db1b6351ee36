// attention and attention_backward on the CPU. What they compute: sparseft/reference.py.
//
// Threads share heads of samples. Of a head, kRowQueries queries are taken at a time: their scores, [keys, queries],
// stay in the second-level cache, and are panels of x as outer_product.h reads them. Every product is such a sum of
// outer products: over features (scores, and gradients of probabilities), over keys (the output, and gradients of
// queries), or over queries (gradients of keys and values), for which scores are transposed.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "ahead.h"
#include "attention_heads.h"
#include "attention_rows.h"
#include "panels.h"
#include "token_spans.h"
#include "transpose_floats.h"

namespace sparseft {
namespace {

static_assert(kRowQueries == kBlockColumns);

using Left = Panels<kBlockRows>;

int64_t whole_rows(int64_t n) { return round_up(n, kBlockRows); }
int64_t whole_columns(int64_t n) { return round_up(n, kBlockColumns); }

// What a thread works in.
struct Scratch {
    Ahead ahead;  // what the next head reads
    Left keys_by_feature, values_by_feature, keys, values, queries, out_gradients;
    std::vector<Row> query, out_gradient, scores, gradients, result, transposed;
    std::vector<float> key_gradients, value_gradients;  // [features, keys], in whole rows and columns
};

template <class T>
T* zeros(std::vector<T>& values, int64_t n) {
    values.assign(n, T{});
    return values.data();
}

// out += weight * left^T right, for the first `rows` columns of left. right: [terms, kBlockColumns].
void multiply(const Left& left, int64_t rows, const float* right, int64_t terms, float weight, float* out,
              int64_t stride, Ahead& ahead) {
    const auto add = outer_product().add;
    for (int64_t i = 0; i < ceil_div(rows, kBlockRows); ++i) {
        ahead.step();
        add(left[i], right, terms, weight, out + i * kBlockRows * stride, stride);
    }
}

// The scores of queries first, first + 1, ..., whose features are in scratch.query.
Row* fill_scores(const View& view, int64_t first, int64_t queries, int64_t keys, float scale, Scratch& scratch) {
    Row* const scores = zeros(scratch.scores, whole_columns(whole_rows(keys)));
    multiply(scratch.keys_by_feature, keys, scratch.query[0].of, scratch.keys_by_feature.rows(), scale, scores[0].of,
             kRowQueries, scratch.ahead);
    if (view.bias) {
        add_bias(scores, keys, queries, view.bias + first * view.query_stride, view.key_stride, view.query_stride);
    }
    if (view.causal) hide_later_keys(scores, keys, first);
    return scores;
}

void attend(const Head& query, const Head& key, const Head& value, const View& view, float scale, const Head& out,
            float* log_sums, Scratch& scratch) {
    scratch.keys_by_feature.pack(key.by_feature());
    scratch.values.pack(value.by_token(0, value.tokens), true);
    for (int64_t first = 0; first < query.tokens; first += kRowQueries) {
        const int64_t queries = std::min(kRowQueries, query.tokens - first), keys = view.seen(first, key.tokens);
        query.read(first, queries, scratch.query);
        Row* const scores = fill_scores(view, first, queries, keys, scale, scratch);
        Row largest, sum, factor;
        exponentials(scores, keys, largest, sum);
        Row* const result = zeros(scratch.result, whole_rows(out.features));
        multiply(scratch.values, out.features, scores[0].of, keys, 1, result[0].of, kRowQueries, scratch.ahead);
        for (int64_t i = 0; i < kRowQueries; ++i) factor[i] = sum[i] == 0 ? 0 : 1 / sum[i];
        multiply_rows(result, out.features, factor);
        out.write(first, queries, result);
        // where no key is seen, all scores are -infinity, and exp(-infinity - 0) is right
        for (int64_t i = 0; i < queries; ++i) {
            log_sums[first + i] = sum[i] == 0 ? 0 : largest[i] + std::log(sum[i]);
        }
    }
}

// The keys and values that some heads of queries share, and their gradients.
struct Source {
    Head key, value, key_gradient, value_gradient;

    int64_t columns() const { return whole_columns(key.tokens); }

    void begin(Scratch& scratch) const {
        scratch.keys_by_feature.pack(key.by_feature());
        scratch.values_by_feature.pack(value.by_feature());
        scratch.keys.pack(key.by_token(0, key.tokens), true);
        zeros(scratch.key_gradients, whole_rows(key.features) * columns());
        zeros(scratch.value_gradients, whole_rows(value.features) * columns());
    }

    void end(const Scratch& scratch) const {
        transpose(scratch.key_gradients.data(), columns(), key.features, key.tokens, key_gradient.data,
                  key_gradient.stride);
        transpose(scratch.value_gradients.data(), columns(), value.features, value.tokens, value_gradient.data,
                  value_gradient.stride);
    }
};

// Add what some queries make of the gradients of keys and values. scores: by now probabilities.
void pull_back_to_source(const Source& source, const Row* scores, const Row* gradients, int64_t queries, int64_t keys,
                         float scale, Scratch& scratch) {
    scratch.transposed.resize(kRowQueries);
    float* const transposed = scratch.transposed[0].of;
    for (int64_t key = 0; key < keys; key += kBlockColumns) {
        transpose(scores[key].of, kRowQueries, kBlockColumns, queries, transposed, kBlockColumns);
        multiply(scratch.out_gradients, source.value.features, transposed, queries, 1,
                 scratch.value_gradients.data() + key, source.columns(), scratch.ahead);
        transpose(gradients[key].of, kRowQueries, kBlockColumns, queries, transposed, kBlockColumns);
        multiply(scratch.queries, source.key.features, transposed, queries, scale, scratch.key_gradients.data() + key,
                 source.columns(), scratch.ahead);
    }
}

void pull_back(const Source& source, const Head& query, const Head& out_gradient, const float* log_sums,
               const View& view, float scale, const Head& query_gradient, Scratch& scratch) {
    for (int64_t first = 0; first < query.tokens; first += kRowQueries) {
        const int64_t queries = std::min(kRowQueries, query.tokens - first),
                      keys = view.seen(first, source.key.tokens);
        Row* const result = zeros(scratch.result, whole_rows(query.features));
        bool any = false;
        Row log_sum;
        std::fill_n(log_sum.of, kRowQueries, kInfinity);
        for (int64_t i = 0; i < queries; ++i) {
            any = any || any_nonzero(out_gradient.at(first + i), out_gradient.features, 1);
            log_sum[i] = log_sums[first + i];
        }
        if (!any) {  // as of most queries in the last layer of a classifier
            query_gradient.write(first, queries, result);
            continue;
        }
        query.read(first, queries, scratch.query);
        out_gradient.read(first, queries, scratch.out_gradient);
        scratch.queries.pack(query.by_token(first, queries), true);
        scratch.out_gradients.pack(out_gradient.by_token(first, queries), true);

        Row* const scores = fill_scores(view, first, queries, keys, scale, scratch);
        Row* const gradients = zeros(scratch.gradients, static_cast<int64_t>(scratch.scores.size()));
        multiply(scratch.values_by_feature, keys, scratch.out_gradient[0].of, out_gradient.features, 1,
                 gradients[0].of, kRowQueries, scratch.ahead);
        softmax_backward(scores, gradients, keys, log_sum);
        multiply(scratch.keys, query.features, gradients[0].of, keys, scale, result[0].of, kRowQueries, scratch.ahead);
        query_gradient.write(first, queries, result);
        // what fills up the last block are scores still, of keys that are not there or not seen
        std::fill(scores + keys, scores + whole_columns(keys), Row{});
        std::fill(gradients + keys, gradients + whole_columns(keys), Row{});
        pull_back_to_source(source, scores, gradients, queries, keys, scale, scratch);
    }
}

// How many blocks `attend` multiplies, or a few more.
int64_t blocks(int64_t queries, int64_t keys, int64_t features) {
    return ceil_div(queries, kRowQueries) * (ceil_div(keys, kBlockRows) + ceil_div(features, kBlockRows));
}

void check_heads(const Argument& argument, const Tensor& tensor, const Tensor& query,
                 std::initializer_list<int64_t> sizes, const char* meaning) {
    check_dtype(argument, tensor, {ScalarType::Float});
    check_device(argument, tensor, query);
    bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
    std::ostringstream wanted, got;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) got << (dim ? ", " : "") << tensor.size(dim);
    int64_t dim = 0;
    for (const int64_t size : sizes) {
        fits = fits && tensor.size(dim) == size;
        wanted << (dim++ ? ", " : "") << size;
    }
    check(fits, argument, " must be ", meaning, ", [", wanted.str(), "], got [", got.str(), "]");
}

void check_inputs(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                  const std::optional<Tensor>& bias) {
    for (const auto& [name, tensor] : {std::pair{"query", query}, {"key", key}, {"value", value}}) {
        check(tensor.dim() == 4, Argument{op, name}, " must be [samples, heads, tokens, features], got ", tensor.dim(),
              " dimensions; insert the missing ones with unsqueeze");
        check(tensor.numel() > 0, Argument{op, name}, " must hold something, got no element; leave the call out");
    }
    const int64_t n = query.size(0), heads = key.size(1), keys = key.size(2);
    check_heads({op, "query"}, query, query, {n, query.size(1), query.size(2), query.size(3)}, "of any sizes");
    check_heads({op, "key"}, key, query, {n, heads, keys, query.size(3)}, "of query's samples and features");
    check_heads({op, "value"}, value, query, {n, heads, keys, value.size(3)}, "of key's samples, heads and tokens");
    check(heads > 0 && query.size(1) % heads == 0, Argument{op, "query"}, " must have a multiple of key's ", heads,
          " heads, got ", query.size(1));
    if (bias) {
        check_heads({op, "bias"}, *bias, query, {n, query.size(1), query.size(2), keys},
                    "[samples, heads, queries, keys], call .expand()");
    }
}

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const std::optional<Tensor>& bias, double scale, bool causal) {
    check_inputs("attention", query, key, value, bias);
    const Heads q(query), k(key), v(value);
    const Views views(causal, bias);
    const Heads out = Heads::empty(query, q.samples(), q.heads(), q.tokens(), v.features());
    const Tensor log_sums = torch::stable::new_empty(query, {q.samples(), q.heads(), q.tokens()});
    float* const sums = static_cast<float*>(log_sums.data_ptr());
    const int64_t group = q.heads() / k.heads();
    torch::stable::parallel_for(0, q.samples() * q.heads(), 1, [&](int64_t begin, int64_t end) {
        Scratch scratch;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t sample = i / q.heads(), head = i % q.heads(), source = head / group;
            scratch.ahead.begin(blocks(q.tokens(), k.tokens(), v.features()));
            if (i + 1 < end) {
                const int64_t next = (i + 1) / q.heads(), next_head = (i + 1) % q.heads();
                scratch.ahead.add(k(next, next_head / group).by_token(0, k.tokens()));
                scratch.ahead.add(v(next, next_head / group).by_token(0, k.tokens()));
                scratch.ahead.add(q(next, next_head).by_token(0, q.tokens()));
            }
            attend(q(sample, head), k(sample, source), v(sample, source), views(sample, head),
                   static_cast<float>(scale), out(sample, head), sums + i * q.tokens(), scratch);
        }
    });
    return {out.tensor(), log_sums};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& out_gradient, const Tensor& query,
                                                      const Tensor& key, const Tensor& value,
                                                      const std::optional<Tensor>& bias, const Tensor& log_sums,
                                                      double scale, bool causal) {
    constexpr char kOp[] = "attention_backward";
    check_inputs(kOp, query, key, value, bias);
    const Heads q(query), k(key), v(value);
    check_heads({kOp, "out_gradient"}, out_gradient, query, {q.samples(), q.heads(), q.tokens(), v.features()},
                "of the sizes of the output");
    check_heads({kOp, "log_sums"}, log_sums, query, {q.samples(), q.heads(), q.tokens()}, "one number a query");
    check_contiguous({kOp, "log_sums"}, log_sums);
    const Heads out_gradients(out_gradient);
    const Views views(causal, bias);
    const Heads dq = Heads::empty(query, q.samples(), q.heads(), q.tokens(), q.features());
    const Heads dk = Heads::empty(query, k.samples(), k.heads(), k.tokens(), k.features());
    const Heads dv = Heads::empty(query, v.samples(), v.heads(), v.tokens(), v.features());
    const float* const sums = static_cast<const float*>(log_sums.data_ptr());
    const int64_t group = q.heads() / k.heads();
    torch::stable::parallel_for(0, k.samples() * k.heads(), 1, [&](int64_t begin, int64_t end) {
        Scratch scratch;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t sample = i / k.heads(), shared = i % k.heads();
            const Source source{k(sample, shared), v(sample, shared), dk(sample, shared), dv(sample, shared)};
            scratch.ahead.begin(group * blocks(q.tokens(), k.tokens(), v.features()));
            if (i + 1 < end) {
                const int64_t next = (i + 1) / k.heads(), next_shared = (i + 1) % k.heads();
                scratch.ahead.add(k(next, next_shared).by_token(0, k.tokens()));
                scratch.ahead.add(v(next, next_shared).by_token(0, k.tokens()));
                scratch.ahead.add(q(next, next_shared * group).by_token(0, q.tokens()));
                scratch.ahead.add(out_gradients(next, next_shared * group).by_token(0, q.tokens()));
            }
            source.begin(scratch);
            for (int64_t head = shared * group; head < (shared + 1) * group; ++head) {
                pull_back(source, q(sample, head), out_gradients(sample, head),
                          sums + (sample * q.heads() + head) * q.tokens(), views(sample, head),
                          static_cast<float>(scale), dq(sample, head), scratch);
            }
            source.end(scratch);
        }
    });
    return {dq.tensor(), dk.tensor(), dv.tensor()};
}

}  // namespace
}  // namespace sparseft

STABLE_TORCH_LIBRARY_IMPL(sparseft, CPU, m) {
    m.impl("attention", TORCH_BOX(&sparseft::attention));
    m.impl("attention_backward", TORCH_BOX(&sparseft::attention_backward));
}
