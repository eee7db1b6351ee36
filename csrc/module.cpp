// The extension module sparseft._C. Importing it, after torch, registers the ops with PyTorch's dispatcher.
#include <stdexcept>
#include <string>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif
#include <torch/headeronly/version.h>

#include "cpu/outer_product.h"
#include "host/lazy_greedy.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
    py::dict ops;
    ops["cpu"] = py::make_tuple("attention", "attention_backward", "fisher_linear_", "fisher_linears_",
                                "fisher_segments_", "layer_norm_backward", "outer_at", "selected_grad_",
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

template <class T>
using Array = py::array_t<T, py::array::c_style>;

py::tuple lazy_greedy(const Array<float>& similarity, const Array<float>& floor, const Array<float>& cap,
                      const Array<double>& bonus, const Array<int64_t>& costs, int64_t budget, bool stop_at_zero) {
    if (similarity.ndim() != 2 || floor.size() != similarity.shape(1) || cap.size() != similarity.shape(1) ||
        bonus.size() != similarity.shape(0) || costs.size() != similarity.shape(0)) {
        throw std::invalid_argument(
            "similarity must be [candidates, represented], floor and cap [represented], bonus and costs [candidates]");
    }
    const sparseft::Coverage function{similarity.data(), similarity.shape(0), similarity.shape(1),
                                      floor.data(),      cap.data(),          bonus.data()};
    const auto heed_interrupts = [] {
        const py::gil_scoped_acquire held;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    };
    sparseft::Choice choice;
    {
        const py::gil_scoped_release released;
        choice = sparseft::lazy_greedy(function, costs.data(), budget, stop_at_zero, heed_interrupts);
    }
    return py::make_tuple(choice.candidates, choice.gains, choice.evaluations);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled ops of sparseft: C++ for the CPU, CUDA C++ where the build had nvcc.";
    m.def("build_info", &build_info, "Say what was compiled, with what: a dict, shown by `sparseft doctor`.");
    m.def("lazy_greedy", &lazy_greedy, py::arg("similarity").noconvert(), py::arg("floor").noconvert(),
          py::arg("cap").noconvert(), py::arg("bonus").noconvert(), py::arg("costs").noconvert(), py::arg("budget"),
          py::arg("stop_at_zero"),
          "Return (candidates, gains, evaluations): what csrc/host/lazy_greedy.h says, of NumPy arrays.");
}
