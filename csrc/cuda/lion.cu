// lion_ on CUDA.
#include <torch/csrc/stable/library.h>

#include "../optimizer_ops.h"
#include "optimizer_step.cuh"

STABLE_TORCH_LIBRARY_IMPL(sparseft, CUDA, m) { m.impl("lion_", TORCH_BOX(&sparseft::lion_<sparseft::CudaOptimizer>)); }
