"""Every op: its schema, its fake, and who serves it on which device. The only file that knows backends.

`torch.ops.sparseft.<op>` is called everywhere else; PyTorch's dispatcher picks the implementation:
C++ on the CPU, C++ or Triton on CUDA, and `reference` wherever neither is there. An extension that is absent is shown
by `sparseft doctor`; one that is there and broken raises on import.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseft import reference
from sparseft.index_lists import count, index_dtype

# what every optimizer's op takes beside its own options, see reference_optim.StepOptions
_STEP_OPTIONS = (
    "float lr, float weight_decay, bool maximize=False, Tensor[]? pretrained=None, int[]? seeds=None, "
    "Tensor(z!)[]? scales=None, Tensor? lr_tensor=None, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
)
SCHEMAS = {
    "attention": "(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale, bool causal) "
    "-> (Tensor, Tensor)",
    "attention_backward": "(Tensor out_gradient, Tensor query, Tensor key, Tensor value, Tensor? bias, "
    "Tensor log_sums, float scale, bool causal) -> (Tensor, Tensor, Tensor)",
    "fisher_linear_": "(Tensor(a!) fisher, Tensor x, Tensor dy, Tensor? sample_weight=None, "
    "Tensor(b!)? scores=None, Tensor? selected=None) -> ()",
    "fisher_linears_": "(Tensor(a!)[] fishers, Tensor[] xs, Tensor[] dys) -> ()",
    "layer_norm_backward": "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight) "
    "-> (Tensor, Tensor, Tensor)",
    "outer_at": "(Tensor left, Tensor right, Tensor indices) -> Tensor",
    "selected_grad_": "(Tensor(a!) grad, Tensor x, Tensor dy, Tensor indices) -> ()",
    "fisher_segments_": "(Tensor(a!) fisher, Tensor x, Tensor dy, Tensor offsets, Tensor? groups=None, "
    "Tensor? weight=None) -> ()",
    "topk_indices": "(Tensor[] scores, int k) -> (Tensor indices, Tensor counts)",
    "gather": "(Tensor[] tensors, Tensor[] indices) -> Tensor[]",
    "delta_swap_": "(Tensor(a!)[] params, Tensor[] indices, Tensor(b!)[] values) -> ()",
    "adamw_": "(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, Tensor(e!)[] steps, *, float beta1, float beta2, float eps, "
    + _STEP_OPTIONS,
    "lion_": "(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, Tensor(b!)[] exp_avgs, Tensor(c!)[] masters, "
    "Tensor(d!)[] steps, *, float beta1, float beta2, " + _STEP_OPTIONS,
    "sgd_": "(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] masters, Tensor(d!)[] steps, *, float momentum, float dampening, bool nesterov=False, "
    + _STEP_OPTIONS,
}

# nobody calls these on a GPU, where torch's own are fast
CPU_ONLY = ("attention", "attention_backward", "layer_norm_backward")

# op -> device -> who serves it there; read by `sparseft doctor`
SERVED_BY: dict[str, dict[str, str]] = {name: {"cpu": "reference", "cuda": "reference"} for name in SCHEMAS}

_library = torch.library.Library("sparseft", "DEF")


def _fake_heads(heads: Tensor, features: int) -> Tensor:
    n, h, t, _ = heads.shape
    return heads.new_empty(n, t, h, features).transpose(1, 2)


def _fake_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    return _fake_heads(query, value.shape[3]), query.new_empty(query.shape[:3])


def _fake_attention_backward(out_gradient: Tensor, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (_fake_heads(tensor, tensor.shape[3]) for tensor in tensors[:3])
    return query, key, value


def _fake_layer_norm_backward(dy: Tensor, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    samples, _, features = dy.shape
    return dy.new_empty(dy.shape), dy.new_empty(samples, features), dy.new_empty(samples, features)


def _fake_outer_at(left: Tensor, right: Tensor, indices: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], indices.numel(), dtype=torch.float32)


def _fake_topk_indices(scores: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    dtype = index_dtype(max(score.numel() for score in scores))
    return scores[0].new_empty(k, dtype=dtype), scores[0].new_empty(len(scores), dtype=torch.int64)


def _fake_gather(tensors: list[Tensor], indices: list[Tensor]) -> list[Tensor]:
    return [tensor.new_empty(count(index, tensor.numel())) for tensor, index in zip(tensors, indices, strict=True)]


def _fake_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for an op that only writes into its arguments."""


_FAKES: dict[str, Callable[..., Any]] = {
    "attention": _fake_attention,
    "attention_backward": _fake_attention_backward,
    "layer_norm_backward": _fake_layer_norm_backward,
    "outer_at": _fake_outer_at,
    "topk_indices": _fake_topk_indices,
    "gather": _fake_gather,
}


def _from_triton(name: str) -> Callable[..., Any]:
    """Return the Triton launcher of an op, imported at its first call: importing triton costs every start 0.4 s."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module("sparseft.kernels"), name)(*args, **kwargs)

    return launch


def _register() -> None:
    for name, schema in SCHEMAS.items():
        _library.define(name + schema)
        _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"sparseft::{name}", _FAKES.get(name, _fake_nothing), lib=_library)
    if importlib.util.find_spec("sparseft._C") is not None:
        # importing it registers its ops; what it holds depends on whether nvcc was there when it was built
        extension = importlib.import_module("sparseft._C")
        for device, names in extension.build_info()["ops"].items():
            for name in names:
                SERVED_BY[name][device] = "c++"
    if importlib.util.find_spec("triton") is not None:
        for name in SCHEMAS:
            if SERVED_BY[name]["cuda"] == "reference" and name not in CPU_ONLY:
                _library.impl(name, _from_triton(name), "CUDA")
                SERVED_BY[name]["cuda"] = "triton"


_register()
