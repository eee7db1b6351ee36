// Greedy maximisation of facility location and its relatives, exactly, without evaluating every candidate every time.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace sparseft {

// The set function f(A) = sum_r (min(cap[r], max(floor[r], max_{c in A} s[c, r])) - floor[r]) + sum_{c in A} bonus[c].
struct Coverage {
    const float* similarity;  // s, [candidates, represented]; finite, not negative
    int64_t candidates, represented;
    const float* floor;   // [represented]
    const float* cap;     // [represented], not below floor
    const double* bonus;  // [candidates]
};

struct Choice {
    std::vector<int64_t> candidates;  // in the order in which they were chosen
    std::vector<double> gains;        // what each added to f
    int64_t evaluations;              // of gains; greedy without bounds makes some candidates * budget of them
};

// Choose candidates one by one, each the one of largest gain / cost among those that cost no more than what the others
// left of the budget, the lowest of those that tie, until none is left. `costs` [candidates] are at least 1; if all
// are, the budget is a count. What is chosen depends on neither threads nor vector units. `stop_at_zero` ends where
// nothing gains any more. `between` is called now and then, from the calling thread, and may throw.
Choice lazy_greedy(const Coverage& function, const int64_t* costs, int64_t budget, bool stop_at_zero,
                   const std::function<void()>& between);

}  // namespace sparseft
