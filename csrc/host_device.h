// Marks functions that CPU loops and CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define SPARSEFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPARSEFT_HOST_DEVICE inline __attribute__((always_inline))
#endif
