// lion_ on the CPU.
#include <torch/csrc/stable/library.h>

#include "../optimizer_ops.h"
#include "optimizer_step.h"

STABLE_TORCH_LIBRARY_IMPL(sparseft, CPU, m) { m.impl("lion_", TORCH_BOX(&sparseft::lion_<sparseft::CpuOptimizer>)); }
