// outer_at on the CPU. What it computes: sparseft/reference.py.
//
// An entry is a dot product over tokens, and tokens lie far apart. So the columns of `right` that are needed are
// transposed once a sample and block of tokens, the columns of `left` as entries come by, which are sorted by them.
#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../checks.h"
#include "simd.h"

namespace sparseft {
namespace {

constexpr int64_t kTokens = 256;             // of a block: one column fills a sixteenth of the first-level cache
constexpr int64_t kLanes = 32;               // tokens multiplied at a time; blocks are filled up with zeros
constexpr int64_t kSmallestShare = 1 << 18;  // multiplications, below which a second thread costs more than it saves

// left or right: [N, T, features].
struct Input {
    const char* data;
    ScalarType dtype;
    int64_t element_size, sample_stride, token_stride, feature_stride;

    explicit Input(const Tensor& tensor)
        : data(static_cast<const char*>(tensor.data_ptr())),
          dtype(tensor.scalar_type()),
          element_size(tensor.element_size()),
          sample_stride(tensor.stride(0)),
          token_stride(tensor.stride(1)),
          feature_stride(tensor.stride(2)) {}
};

// Tokens first..last of one sample.
struct Block {
    int64_t sample, first, last;

    int64_t padded() const { return (last - first + kLanes - 1) / kLanes * kLanes; }
};

template <class T>
void copy_column(const T* from, int64_t stride, int64_t tokens, float* out) {
    for (int64_t t = 0; t < tokens; ++t) out[t] = static_cast<float>(from[t * stride]);
}

// One feature of a block, as fp32 without gaps, filled up with zeros.
void read_column(const Input& input, const Block& block, int64_t feature, float* out) {
    const int64_t offset =
        block.sample * input.sample_stride + block.first * input.token_stride + feature * input.feature_stride;
    const char* const from = input.data + offset * input.element_size;
    const int64_t tokens = block.last - block.first;
    if (input.dtype == ScalarType::Float) {
        copy_column(reinterpret_cast<const float*>(from), input.token_stride, tokens, out);
    } else if (input.dtype == ScalarType::BFloat16) {
        copy_column(reinterpret_cast<const torch::headeronly::BFloat16*>(from), input.token_stride, tokens, out);
    } else {
        copy_column(reinterpret_cast<const torch::headeronly::Half*>(from), input.token_stride, tokens, out);
    }
    std::fill(out + tokens, out + block.padded(), 0.0f);
}

// Add the dot products of `row` with `count` columns to `out`; `columns` says where each lies in `packed`.
SPARSEFT_SIMD void add_dots(const float* __restrict row, const float* __restrict packed, const int32_t* columns,
                            int64_t count, int64_t length, float* __restrict out) {
    for (int64_t i = 0; i < count; ++i) {
        const float* const column = packed + columns[i] * length;
        float sums[kLanes] = {};
        for (int64_t t = 0; t < length; t += kLanes) {
            for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += row[t + lane] * column[t + lane];
        }
        for (int64_t width = kLanes / 2; width > 0; width /= 2) {
            for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
        }
        out[i] += sums[0];
    }
}

// The entries: which row and which of the columns in use each belongs to.
class Entries {
  public:
    template <class Index>
    Entries(const Index* indices, int64_t k, int64_t features) : slots_(k) {
        std::vector<int32_t> slot_of(features, -1);
        for (int64_t j = 0; j < k; ++j) {
            const int64_t row = indices[j] / features, column = indices[j] % features;
            if (row_of_run_.empty() || row != row_of_run_.back()) {
                row_of_run_.push_back(row);
                run_starts_.push_back(j);
            }
            if (slot_of[column] < 0) {
                slot_of[column] = static_cast<int32_t>(columns_.size());
                columns_.push_back(column);
            }
            slots_[j] = slot_of[column];
        }
        run_starts_.push_back(k);
    }

    const std::vector<int64_t>& columns() const { return columns_; }
    const int32_t* slots() const { return slots_.data(); }

    // Call `body(row, begin, end)` for each run of entries of one row, of the entries first..last.
    template <class Body>
    void for_each_run(int64_t first, int64_t last, const Body& body) const {
        size_t run = std::upper_bound(run_starts_.begin(), run_starts_.end(), first) - run_starts_.begin() - 1;
        for (; first < last; ++run) {
            const int64_t end = std::min(last, run_starts_[run + 1]);
            body(row_of_run_[run], first, end);
            first = end;
        }
    }

  private:
    std::vector<int64_t> columns_, row_of_run_, run_starts_;
    std::vector<int32_t> slots_;
};

Entries entries_of(const Tensor& indices, int64_t features) {
    if (indices.scalar_type() == ScalarType::Long) {
        return Entries(static_cast<const int64_t*>(indices.data_ptr()), indices.numel(), features);
    }
    return Entries(static_cast<const int32_t*>(indices.data_ptr()), indices.numel(), features);
}

struct Problem {
    Input left, right;
    int64_t samples, tokens, k;
    const Entries& entries;
    float* out;  // [samples, k], zeros

    // Entries first..last of one sample.
    void add(int64_t sample, int64_t first, int64_t last, std::vector<float>& packed) const {
        alignas(64) std::array<float, kTokens> row;
        const std::vector<int64_t>& columns = entries.columns();
        for (int64_t token = 0; token < tokens; token += kTokens) {
            const Block block{sample, token, std::min(token + kTokens, tokens)};
            const int64_t length = block.padded();
            packed.resize(std::max<size_t>(packed.size(), columns.size() * length));
            for (size_t i = 0; i < columns.size(); ++i) {
                read_column(right, block, columns[i], packed.data() + i * length);
            }
            entries.for_each_run(first, last, [&](int64_t feature, int64_t begin, int64_t end) {
                read_column(left, block, feature, row.data());
                add_dots(row.data(), packed.data(), entries.slots() + begin, end - begin, length,
                         out + sample * k + begin);
            });
        }
    }
};

void check_input(const char* name, const Tensor& tensor, const Tensor& left) {
    const Argument argument{"outer_at", name};
    check_dtype(argument, tensor, kFloatTypes);
    check_device(argument, tensor, left);
    check(tensor.dim() == 3, argument, " must be [samples, tokens, features], got ", tensor.dim(),
          " dimensions; insert the missing one with unsqueeze");
    check(tensor.size(0) == left.size(0) && tensor.size(1) == left.size(1), argument,
          " must have the samples and tokens of left, ", left.size(0), " and ", left.size(1), ", got ", tensor.size(0),
          " and ", tensor.size(1));
    check(tensor.scalar_type() == left.scalar_type(), argument, " must have the dtype of left, ",
          dtype_name(left.scalar_type()), ", got ", dtype_name(tensor.scalar_type()), "; convert it with .to()");
}

template <class Index>
void check_entries(const Argument& argument, const Tensor& indices, int64_t numel) {
    const Index* const begin = static_cast<const Index*>(indices.data_ptr());
    const Index* const end = begin + indices.numel();
    const Index* const wrong = std::adjacent_find(begin, end, std::greater_equal<Index>());
    check(wrong == end, argument, " must be sorted and unique; sort it and drop repeated entries");
    check(*begin >= 0 && end[-1] < numel, argument, " must be from 0 to ", numel - 1,
          ", inside [features of left, features of right], got ", *begin, " to ", end[-1]);
}

void check_indices(const Tensor& indices, const Tensor& left, const Tensor& right) {
    const Argument argument{"outer_at", "indices"};
    check_dtype(argument, indices, kIndexTypes);
    check_contiguous(argument, indices);
    check_device(argument, indices, left);
    check(indices.dim() == 1, argument, " must be one list, got ", indices.dim(), " dimensions");
    if (indices.numel() == 0) return;
    const int64_t numel = left.size(2) * right.size(2);
    indices.scalar_type() == ScalarType::Long ? check_entries<int64_t>(argument, indices, numel)
                                              : check_entries<int32_t>(argument, indices, numel);
}

Tensor outer_at(const Tensor& left, const Tensor& right, const Tensor& indices) {
    check_input("left", left, left);
    check_input("right", right, left);
    check_indices(indices, left, right);
    const int64_t samples = left.size(0), k = indices.numel();
    Tensor result = torch::stable::new_zeros(left, {samples, k}, ScalarType::Float);
    if (left.numel() == 0 || k == 0) return result;

    const Entries entries = entries_of(indices, right.size(2));
    const Problem problem{
        Input(left), Input(right), samples, left.size(1), k, entries, static_cast<float*>(result.data_ptr())};
    // where there are fewer samples than threads, threads share a sample's entries
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t parts = std::max<int64_t>(1, std::min(threads / samples, k));
    const int64_t grain = std::max<int64_t>(1, kSmallestShare * parts / (problem.tokens * k));
    torch::stable::parallel_for(0, samples * parts, grain, [&](int64_t begin, int64_t end) {
        std::vector<float> packed;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t part = item % parts;
            problem.add(item / parts, k * part / parts, k * (part + 1) / parts, packed);
        }
    });
    return result;
}

}  // namespace
}  // namespace sparseft

STABLE_TORCH_LIBRARY_IMPL(sparseft, CPU, m) { m.impl("outer_at", TORCH_BOX(&sparseft::outer_at)); }
