// delta_swap_ on CUDA.
#include <torch/csrc/stable/library.h>

#include "../entry_ops.h"
#include "entries.cuh"

STABLE_TORCH_LIBRARY_IMPL(sparseft, CUDA, m) {
    m.impl("delta_swap_", TORCH_BOX(&sparseft::delta_swap_<sparseft::CudaEntries>));
}
