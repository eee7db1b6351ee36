// The extension module sparseft._C. Importing it, after torch, registers the ops with PyTorch's dispatcher.
#include <string>

#include <pybind11/pybind11.h>
#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif
#include <torch/headeronly/version.h>

#include "cpu/outer_product.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
    py::dict ops;
    ops["cpu"] = py::make_tuple("fisher_linear_", "fisher_linears_", "fisher_segments_", "outer_at", "selected_grad_",
                                "topk_indices", "gather", "delta_swap_", "adamw_", "lion_", "sgd_");
    ops["cuda"] = py::tuple();
    py::dict info;
    info["cuda"] = py::none();
#ifdef USE_CUDA
    ops["cuda"] = py::make_tuple("gather", "delta_swap_", "adamw_", "lion_", "sgd_");
    info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#endif
    info["ops"] = ops;
#ifdef __clang__
    info["compiler"] = __VERSION__;
#else
    info["compiler"] = "GCC " __VERSION__;
#endif
    info["vector_unit"] = sparseft::outer_product().vector_unit;
    info["torch_built_with"] = TORCH_VERSION;
    info["torch_at_least"] = "2.10";
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled ops of sparseft: C++ for the CPU, CUDA C++ where the build had nvcc.";
    m.def("build_info", &build_info, "Say what was compiled, with what: a dict, shown by `sparseft doctor`.");
}
