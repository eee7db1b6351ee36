// Argument checks. Every message says what is wrong, what was got, what was wanted, and how to put it right.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace sparseft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where an argument stands in a call: "adamw_: grads[3]", or "fisher_linear_: x" outside a list.
struct Argument {
    const char* op;
    const char* name;
    int64_t position = -1;
};

inline std::ostream& operator<<(std::ostream& out, const Argument& argument) {
    out << argument.op << ": " << argument.name;
    return argument.position < 0 ? out : out << '[' << argument.position << ']';
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

template <class... Parts>
void check(bool holds, const Parts&... parts) {
    if (!holds) fail(parts...);
}

inline const char* dtype_name(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Half:
            return "float16";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Short:
            return "int16";
        case ScalarType::Byte:
            return "uint8";
        case ScalarType::Bool:
            return "bool";
        default:
            return torch::headeronly::toString(dtype);
    }
}

inline const std::initializer_list<ScalarType> kFloatTypes = {ScalarType::Float, ScalarType::BFloat16,
                                                              ScalarType::Half};
inline const std::initializer_list<ScalarType> kPositionTypes = {ScalarType::Int, ScalarType::Long};

// What Tensor::scalar_type() returns. That one compares with a dozen dtypes, by a call of libtorch for each.
inline ScalarType dtype_of(const Tensor& tensor) {
    int32_t code = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
    if (code == aoti_torch_dtype_float32()) return ScalarType::Float;
    if (code == aoti_torch_dtype_int16()) return ScalarType::Short;
    if (code == aoti_torch_dtype_int32()) return ScalarType::Int;
    if (code == aoti_torch_dtype_bfloat16()) return ScalarType::BFloat16;
    return tensor.scalar_type();
}

inline void check_dtype(const Argument& argument, const Tensor& tensor, std::initializer_list<ScalarType> wanted) {
    const ScalarType got = dtype_of(tensor);
    if (std::find(wanted.begin(), wanted.end(), got) != wanted.end()) return;
    std::string names;
    for (const ScalarType dtype : wanted) names += (names.empty() ? "" : " or ") + std::string(dtype_name(dtype));
    fail(argument, " must be ", names, ", got ", dtype_name(got), "; convert it with .to()");
}

inline void check_numel(const Argument& argument, const Tensor& tensor, int64_t wanted, const char* because) {
    check(tensor.numel() == wanted, argument, " must have ", wanted, " elements, ", because, ", got ", tensor.numel());
}

inline void check_contiguous(const Argument& argument, const Tensor& tensor) {
    check(tensor.is_contiguous(), argument,
          " must be contiguous, got gaps or another order; call .contiguous() first");
}

// Where a tensor is. Taken once from the first tensor of a call, it saves asking that again for every other one.
struct Place {
    int32_t type, index;

    Place(const Tensor& tensor) : type(0), index(0) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
    }
};

inline void check_device(const Argument& argument, const Place& place, const Place& wanted) {
    check(place.type == wanted.type && place.index == wanted.index, argument,
          " must be on the device of the first tensor of the call, got another; move it, or call once per device");
}

inline void check_length(const Argument& argument, const std::vector<Tensor>& list, size_t wanted) {
    check(list.size() == wanted, argument, " must hold one tensor for each of the ", wanted,
          " in the first list, got ", list.size());
}

}  // namespace sparseft
