// Lazy greedy (Minoux, 1978): a gain only falls as the chosen set grows, so an old gain bounds the new one, and a
// candidate whose bound is below another's gain need not be looked at.
//
// That holds for the rounded sums too: each term falls, sums have one order, and rounding keeps the order of numbers,
// of quotients of a gain and its cost as well. Nor does a candidate become affordable that once was not. So the choice
// is that of plain greedy with the same sums, bit for bit. The order, which sparseft/data/greedy.py follows as well:
// term r goes to lane r % kLanes, lanes are added up by halves.
#include "lazy_greedy.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <limits>
#include <sstream>
#include <stdexcept>

#include <torch/csrc/stable/ops.h>

#include "../cpu/simd.h"

namespace sparseft {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kShare = 1 << 20;       // similarities below which a second thread costs more than it gives
constexpr size_t kFirstBatch = 8;         // bounds that are renewed together; the next batch is twice as large
constexpr int64_t kPicksBetween = 16;     // calls of `between`
constexpr int64_t kRowsBetween = 1 << 9;  // candidates of the first pass for each

inline __attribute__((always_inline)) double more(float similarity, float cap, float covered) {
    const float reached = similarity < cap ? similarity : cap;
    const double difference = static_cast<double>(reached) - static_cast<double>(covered);
    return difference > 0.0 ? difference : 0.0;
}

SPARSEFT_SIMD double covered_more(const float* similarity, const float* cap, const float* covered, int64_t n) {
    double lanes[kLanes] = {};
    int64_t r = 0;
    for (; r + kLanes <= n; r += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            lanes[lane] += more(similarity[r + lane], cap[r + lane], covered[r + lane]);
        }
    }
    for (int64_t lane = 0; r + lane < n; ++lane) {
        lanes[lane] += more(similarity[r + lane], cap[r + lane], covered[r + lane]);
    }
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
        for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
}

SPARSEFT_SIMD bool is_similarity(const float* values, int64_t n) {
    int32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad |= !(values[i] >= 0.0f) | !(values[i] <= std::numeric_limits<float>::max());
    return bad == 0;
}

// The gain of a candidate once `at` others were chosen, for each unit of its cost too: a bound of these ever after.
struct Bound {
    double rate;
    double gain;
    int64_t candidate;
    int64_t at;
};

// Orders a heap: the largest rate first, of equal ones the lowest candidate.
bool comes_later(const Bound& left, const Bound& right) {
    return left.rate < right.rate || (left.rate == right.rate && left.candidate > right.candidate);
}

class Search {
  public:
    Search(const Coverage& function, const int64_t* costs)
        : function_(function), costs_(costs), covered_(function.floor, function.floor + function.represented) {}

    // Evaluate every candidate, check its similarities on the way, and keep those that cost no more than the budget.
    void start(int64_t budget, const std::function<void()>& between) {
        std::vector<Bound> all;
        all.reserve(function_.candidates);
        for (int64_t c = 0; c < function_.candidates; ++c) all.push_back({0.0, 0.0, c, 0});
        std::atomic<int64_t> bad{function_.candidates};
        for (int64_t first = 0; first < function_.candidates; first += kRowsBetween) {
            const int64_t last = std::min(first + kRowsBetween, function_.candidates);
            torch::stable::parallel_for(first, last, grain(), [&](int64_t begin, int64_t end) {
                for (int64_t c = begin; c < end; ++c) {
                    if (!is_similarity(row(c), function_.represented)) {
                        int64_t lowest = bad.load();
                        while (c < lowest && !bad.compare_exchange_weak(lowest, c)) {
                        }
                        return;
                    }
                    all[c] = bound(c, 0);
                }
            });
            if (bad < function_.candidates) fail(bad);
            between();
        }
        evaluations_ = function_.candidates;
        std::copy_if(all.begin(), all.end(), std::back_inserter(heap_),
                     [&](const Bound& one) { return costs_[one.candidate] <= budget; });
        std::make_heap(heap_.begin(), heap_.end(), comes_later);
    }

    // Return the best candidate that costs no more than `left`, once `picks` were chosen; null if there is none.
    const Bound* best(int64_t picks, int64_t left) {
        for (size_t batch = kFirstBatch; !heap_.empty() && heap_.front().at != picks; batch *= 2) {
            stale_.clear();
            while (!heap_.empty() && heap_.front().at != picks && stale_.size() < batch) {
                std::pop_heap(heap_.begin(), heap_.end(), comes_later);
                if (costs_[heap_.back().candidate] <= left) stale_.push_back(heap_.back());
                heap_.pop_back();
            }
            const int64_t count = static_cast<int64_t>(stale_.size());
            torch::stable::parallel_for(0, count, grain(), [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) stale_[i] = bound(stale_[i].candidate, picks);
            });
            for (const Bound& renewed : stale_) {
                heap_.push_back(renewed);
                std::push_heap(heap_.begin(), heap_.end(), comes_later);
            }
            evaluations_ += count;
        }
        return heap_.empty() ? nullptr : &heap_.front();
    }

    // Add the candidate that `best` returned.
    void choose(int64_t candidate) {
        std::pop_heap(heap_.begin(), heap_.end(), comes_later);
        heap_.pop_back();
        const float* const similarity = row(candidate);
        for (int64_t r = 0; r < function_.represented; ++r) {
            covered_[r] = std::max(covered_[r], std::min(similarity[r], function_.cap[r]));
        }
    }

    int64_t evaluations() const { return evaluations_; }

  private:
    const float* row(int64_t candidate) const { return function_.similarity + candidate * function_.represented; }

    int64_t grain() const { return std::max<int64_t>(1, kShare / std::max<int64_t>(1, function_.represented)); }

    Bound bound(int64_t candidate, int64_t picks) const {
        const double gain = covered_more(row(candidate), function_.cap, covered_.data(), function_.represented) +
                            function_.bonus[candidate];
        return {gain / static_cast<double>(costs_[candidate]), gain, candidate, picks};
    }

    [[noreturn]] void fail(int64_t candidate) const {
        const float* const values = row(candidate);
        int64_t r = 0;
        while (is_similarity(values + r, 1)) ++r;
        std::ostringstream message;
        message << "similarity must be finite and not negative, got " << values[r] << " of candidate " << candidate
                << " for sample " << r << "; shift or clip it with sparseft.data.nonnegative";
        throw std::invalid_argument(message.str());
    }

    const Coverage& function_;
    const int64_t* costs_;
    std::vector<float> covered_;
    std::vector<Bound> heap_, stale_;
    int64_t evaluations_ = 0;
};

}  // namespace

Choice lazy_greedy(const Coverage& function, const int64_t* costs, int64_t budget, bool stop_at_zero,
                   const std::function<void()>& between) {
    Search search(function, costs);
    search.start(budget, between);
    Choice choice{};
    for (int64_t picks = 0, left = budget;; ++picks) {
        const Bound* const best = search.best(picks, left);
        if (best == nullptr || (stop_at_zero && !(best->gain > 0.0))) break;
        left -= costs[best->candidate];
        choice.candidates.push_back(best->candidate);
        choice.gains.push_back(best->gain);
        search.choose(best->candidate);
        if (picks % kPicksBetween == 0) between();
    }
    choice.evaluations = search.evaluations();
    return choice;
}

}  // namespace sparseft
