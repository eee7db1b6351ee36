// Cuts a list of tensors into pieces of similar size and works on them in parallel. Selected entries are spread very
// unevenly over tensors, so threads share pieces, not tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace sparseft {

struct Piece {
    int64_t id;      // position in the work list
    int64_t tensor;  // position in the list of tensors
    int64_t begin;   // first entry, inside the tensor
    int64_t end;     // one past the last
};

class WorkList {
  public:
    // `item_size(i)` entries in tensor i < n, at most `piece_size` to a piece.
    template <class ItemSize>
    WorkList(size_t n, int64_t piece_size, const ItemSize& item_size) : piece_size_(piece_size) {
        first_piece_.reserve(n + 1);
        sizes_.reserve(n);
        first_piece_.push_back(0);
        for (size_t i = 0; i < n; ++i) {
            sizes_.push_back(item_size(i));
            entries_ += sizes_.back();
            first_piece_.push_back(first_piece_.back() + (sizes_.back() + piece_size - 1) / piece_size);
        }
    }

    int64_t pieces() const { return first_piece_.back(); }

    // Call `worker(for_each_piece)` from several threads; `for_each_piece(body)` goes through the thread's own share.
    // Shares are of at least `grain` entries or so, that little work stays on one thread. Workers must not throw.
    template <class Worker>
    void parallel(int64_t grain, const Worker& worker) const {
        const int64_t grain_pieces = std::max<int64_t>(1, grain * pieces() / std::max<int64_t>(1, entries_));
        torch::stable::parallel_for(0, pieces(), grain_pieces, [&](int64_t first, int64_t last) {
            worker([&](const auto& body) { for_each(first, last, body); });
        });
    }

    template <class Body>
    void for_each(int64_t first, int64_t last, const Body& body) const {
        auto tensor = std::upper_bound(first_piece_.begin(), first_piece_.end(), first) - first_piece_.begin() - 1;
        for (int64_t id = first; id < last; ++id) {
            while (id >= first_piece_[tensor + 1]) ++tensor;
            const int64_t begin = (id - first_piece_[tensor]) * piece_size_;
            body(Piece{id, tensor, begin, std::min(begin + piece_size_, sizes_[tensor])});
        }
    }

  private:
    int64_t piece_size_;
    int64_t entries_ = 0;
    std::vector<int64_t> sizes_;
    std::vector<int64_t> first_piece_;
};

}  // namespace sparseft
