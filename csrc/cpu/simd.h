// Compiles a function once for each vector unit; the loader picks what the machine has. The binary itself runs on any
// machine of its architecture. Only GCC does so: clang cannot do it to templates.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define SPARSEFT_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SPARSEFT_SIMD
#endif
