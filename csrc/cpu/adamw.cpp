// adamw_ on the CPU.
#include <torch/csrc/stable/library.h>

#include "../optimizer_ops.h"
#include "optimizer_step.h"

STABLE_TORCH_LIBRARY_IMPL(sparseft, CPU, m) { m.impl("adamw_", TORCH_BOX(&sparseft::adamw_<sparseft::CpuOptimizer>)); }
