// gather on CUDA.
#include <torch/csrc/stable/library.h>

#include "../entry_ops.h"
#include "entries.cuh"

STABLE_TORCH_LIBRARY_IMPL(sparseft, CUDA, m) { m.impl("gather", TORCH_BOX(&sparseft::gather<sparseft::CudaEntries>)); }
