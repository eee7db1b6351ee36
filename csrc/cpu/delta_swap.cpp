// delta_swap_ on the CPU.
#include <torch/csrc/stable/library.h>

#include "../entry_ops.h"
#include "entries.h"

STABLE_TORCH_LIBRARY_IMPL(sparseft, CPU, m) {
    m.impl("delta_swap_", TORCH_BOX(&sparseft::delta_swap_<sparseft::CpuEntries>));
}
