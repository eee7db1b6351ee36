// gather on the CPU.
#include <torch/csrc/stable/library.h>

#include "../entry_ops.h"
#include "entries.h"

STABLE_TORCH_LIBRARY_IMPL(sparseft, CPU, m) { m.impl("gather", TORCH_BOX(&sparseft::gather<sparseft::CpuEntries>)); }
