// fisher_segments_ on the CPU. What it computes: sparseft/reference.py; how the work is cut: fisher_tiles.h.
#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "fisher_tiles.h"

namespace sparseft {
namespace {

constexpr char kOp[] = "fisher_segments_";

// x or dy: [M, features].
struct Rows {
    const char* data;
    ScalarType dtype;
    int64_t element_size, row_stride, feature_stride;

    explicit Rows(const Tensor& tensor)
        : data(static_cast<const char*>(tensor.data_ptr())),
          dtype(tensor.scalar_type()),
          element_size(tensor.element_size()),
          row_stride(tensor.stride(0)),
          feature_stride(tensor.stride(1)) {}

    // Features begin..end of `count` rows, [count, end - begin].
    Matrix of(int64_t first, int64_t count, int64_t begin, int64_t end) const {
        return {data + (first * row_stride + begin * feature_stride) * element_size,
                count,
                end - begin,
                row_stride,
                feature_stride,
                element_size,
                dtype};
    }
};

struct Segment {
    int64_t first_row, rows;
    float weight;
};

// The segments of one slab of the Fisher diagonal, in their order.
struct Group {
    float* fisher;  // [O, I]
    std::vector<Segment> segments;
};

void add_segments(const Group& group, const Rows& x, const Rows& dy, int64_t columns, const Tile& tile,
                  Packed& packed) {
    for (const Segment& segment : group.segments) {
        packed.dy.pack(dy.of(segment.first_row, segment.rows, tile.row_begin, tile.row_end));
        packed.x.pack(x.of(segment.first_row, segment.rows, tile.column_begin, tile.column_end));
        add_tile(tile, packed, outer_product().add_squares, segment.weight, group.fisher, columns);
    }
}

void check_rows(const char* name, const Tensor& tensor, const Tensor& x, const Tensor& fisher) {
    const Argument argument{kOp, name};
    check_dtype(argument, tensor, kFloatTypes);
    check_device(argument, tensor, fisher);
    check(tensor.dim() == 2, argument, " must be [rows, features], got ", tensor.dim(),
          " dimensions; flatten samples and tokens into rows");
    check(tensor.size(0) == x.size(0), argument, " must have the rows of x, ", x.size(0), ", got ", tensor.size(0));
    check(tensor.scalar_type() == x.scalar_type(), argument, " must have the dtype of x, ",
          dtype_name(x.scalar_type()), ", got ", dtype_name(tensor.scalar_type()), "; convert it with .to()");
}

void check_fisher(const Tensor& fisher, const Tensor& x, const Tensor& dy, bool grouped) {
    const Argument argument{kOp, "fisher"};
    check_dtype(argument, fisher, {ScalarType::Float});
    check_contiguous(argument, fisher);
    check(fisher.dim() == (grouped ? 3 : 2), argument, " must be [O, I] without groups and [G, O, I] with them, got ",
          fisher.dim(), " dimensions ", grouped ? "and groups" : "and no groups");
    const int64_t last = fisher.dim() - 1;
    check(fisher.size(last - 1) == dy.size(1) && fisher.size(last) == x.size(1), argument,
          " must end in [features of dy, features of x], [", dy.size(1), ", ", x.size(1), "], got [",
          fisher.size(last - 1), ", ", fisher.size(last), "]");
}

// A list with one value a segment, read in place or from a copy without gaps, which `held` keeps alive.
template <class T>
const T* values_of(const char* name, const std::optional<Tensor>& tensor, ScalarType dtype, int64_t count,
                   const Tensor& fisher, std::vector<Tensor>& held) {
    if (!tensor.has_value()) return nullptr;
    const Argument argument{kOp, name};
    check_dtype(argument, *tensor, {dtype});
    check_numel(argument, *tensor, count, "as the number of segments says");
    check_device(argument, *tensor, fisher);
    held.push_back(torch::stable::contiguous(*tensor));
    return static_cast<const T*>(held.back().data_ptr());
}

std::vector<Group> groups_of(const Tensor& fisher, int64_t segments, int64_t rows, const int64_t* offsets,
                             const int64_t* groups, const float* weight) {
    const int64_t slabs = groups ? fisher.size(0) : 1;
    std::vector<Group> result(slabs);
    for (int64_t g = 0; g < slabs; ++g) {
        result[g].fisher = static_cast<float*>(fisher.data_ptr()) + g * (fisher.numel() / slabs);
    }
    for (int64_t s = 0; s <= segments; ++s) {
        check(offsets[s] >= (s ? offsets[s - 1] : 0) && offsets[s] <= rows, Argument{kOp, "offsets", s},
              " must ascend from 0 or more to at most ", rows, ", the rows of x, got ", offsets[s]);
    }
    for (int64_t s = 0; s < segments; ++s) {
        const int64_t group = groups ? groups[s] : 0;
        check(group >= 0 && group < slabs, Argument{kOp, "groups", s}, " must be at least 0 and below ", slabs,
              ", the slabs of fisher, got ", group);
        const Segment segment{offsets[s], offsets[s + 1] - offsets[s], weight ? weight[s] : 1};
        if (segment.rows) result[group].segments.push_back(segment);
    }
    const auto empty = [](const Group& group) { return group.segments.empty(); };
    result.erase(std::remove_if(result.begin(), result.end(), empty), result.end());
    return result;
}

void fisher_segments_(const Tensor& fisher, const Tensor& x, const Tensor& dy, const Tensor& offsets,
                      const std::optional<Tensor>& groups, const std::optional<Tensor>& weight) {
    check_rows("x", x, x, fisher);
    check_rows("dy", dy, x, fisher);
    check_fisher(fisher, x, dy, groups.has_value());
    check(offsets.dim() == 1 && offsets.numel() > 0, Argument{kOp, "offsets"},
          " must be [S + 1], one more than there are segments, got ", offsets.dim(), " dimensions and ",
          offsets.numel(), " elements");
    const int64_t segments = offsets.numel() - 1;
    std::vector<Tensor> held;
    const auto* starts = values_of<int64_t>("offsets", offsets, ScalarType::Long, segments + 1, fisher, held);
    const auto* group = values_of<int64_t>("groups", groups, ScalarType::Long, segments, fisher, held);
    const auto* weights = values_of<float>("weight", weight, ScalarType::Float, segments, fisher, held);
    check(!groups.has_value() || fisher.size(0) > 0 || !segments, Argument{kOp, "fisher"}, " must have a slab, got 0");
    if (fisher.numel() == 0) return;
    const std::vector<Group> work = groups_of(fisher, segments, x.size(0), starts, group, weights);

    const int64_t columns = x.size(1);
    const Rows x_rows(x), dy_rows(dy);
    int64_t longest = 1;
    for (const Group& each : work) {
        for (const Segment& segment : each.segments) longest = std::max(longest, segment.rows);
    }
    const std::vector<Tile> cut = tiles(dy.size(1), columns, longest, torch::stable::get_num_threads());
    const int64_t per_group = static_cast<int64_t>(cut.size());
    const int64_t count = static_cast<int64_t>(work.size()) * per_group;
    const int64_t operations = std::max<int64_t>(1, x.numel() * dy.size(1));
    const int64_t grain = std::max<int64_t>(1, kSmallestShare * count / operations);
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        Packed packed;
        for (int64_t i = begin; i < end; ++i) {
            add_segments(work[i / per_group], x_rows, dy_rows, columns, cut[i % per_group], packed);
        }
    });
}

}  // namespace
}  // namespace sparseft

STABLE_TORCH_LIBRARY_IMPL(sparseft, CPU, m) { m.impl("fisher_segments_", TORCH_BOX(&sparseft::fisher_segments_)); }
