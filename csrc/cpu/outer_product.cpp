// outer_product.h for every vector unit, and the choice among them at run time.
#include "outer_product.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__)
#define SPARSEFT_X86
#endif

namespace sparseft {
namespace {

constexpr int64_t kTokensInOneSum = 512;  // longer sums are sums of such: rounding errors add up less

// simd.h compiles one loop for several units and leaves the vectors to the compiler, which would not keep a block in
// registers; here their number of floats is part of the program.
#ifdef SPARSEFT_X86
namespace avx512 {
#define SPARSEFT_TARGET __attribute__((target("avx512f")))
#define SPARSEFT_LANES 16
#include "outer_product_block.h"
}  // namespace avx512

namespace avx2 {
#define SPARSEFT_TARGET __attribute__((target("avx2,fma")))
#define SPARSEFT_LANES 8
#include "outer_product_block.h"
}  // namespace avx2
#endif

namespace baseline {  // 128 bits: SSE2, NEON
#define SPARSEFT_TARGET
#define SPARSEFT_LANES 4
#include "outer_product_block.h"
}  // namespace baseline

OuterProduct choose() {
#ifdef SPARSEFT_X86
    const char* const value = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view limit = value ? value : "";
    if (limit != "default") {
        if (limit != "avx2" && __builtin_cpu_supports("avx512f")) return avx512::make("AVX-512");
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::make("AVX2");
    }
#endif
    return baseline::make("baseline");
}

}  // namespace

const OuterProduct& outer_product() {
    static const OuterProduct chosen = choose();
    return chosen;
}

}  // namespace sparseft
