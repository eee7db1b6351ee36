"""Matrix products of linear layers: their dtype, and the faster of the two libraries that torch carries for the CPU.

torch gives fp32 products to MKL, which keeps to AVX2 on processors that Intel did not make: on a Zen 5 that is less
than half the speed of oneDNN, which torch carries too. There products of some size go to oneDNN. It rounds in another
order: results agree to fp32 accuracy, not bit for bit. Rows of gradients that are zero are not multiplied.
"""

from __future__ import annotations

import functools
import math
import platform
from pathlib import Path

import torch
from torch import Tensor

_FEWEST_ROWS = 16  # below, starting oneDNN costs what it saves
_SMALLEST_WEIGHT = 1 << 13
_SMALLEST_GRADIENT = 1 << 21  # in multiply-adds
_ROWS_AT_ONCE = 64  # oneDNN keeps code for every number of rows that it met
_ROWS_SEEN = 256  # about; each is a line of memory
_SMALLEST_PRODUCT = 1 << 24  # in multiply-adds, of an input gradient whose rows are looked through


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias, in memory of its own; no gradient is recorded.

    x: [..., I]; weight: [O, I]; bias: [O]; one dtype.
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.linear(x, weight, bias)
    rows, shape = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), [*x.shape[:-1], weight.shape[0]]
    # no views are returned: autograd would not let them be changed in place
    large = len(rows) >= _FEWEST_ROWS and weight.numel() >= _SMALLEST_WEIGHT
    if large and _onednn_is_faster(rows) and (bias is None or bias.shape == weight.shape[:1]):
        # oneDNN reads a bias as if it had no gaps
        bias = None if bias is None else bias.contiguous()
        y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        unviewed: Tensor = torch.ops.aten._unsafe_view(y, shape)
        return unviewed
    y = x.new_empty(shape)
    out = y.view(len(rows), weight.shape[0])
    if bias is not None and not (x.device.type == "cpu" and x.dtype == torch.float32):
        torch.addmm(bias, rows, weight.T, out=out)
        return y
    torch.mm(rows, weight.T, out=out)
    # on the CPU addmm with an `out` copies the bias to every row first, and the product reads all of it again
    return y if bias is None else y.add_(bias)


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """Return dy @ weight, the gradient of a linear layer's input, in memory of its own; no gradient is recorded.

    dy: [..., O]; weight: [O, I]; one dtype. On the CPU rows of dy that are zero are left out, if a quarter of them is:
    padding, and in the last layer of a classifier every token that its head does not look at.
    """
    rows = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
    live = _live_rows(rows, weight)
    if live is None:
        return linear(dy, weight.T)
    dx = dy.new_zeros([*dy.shape[:-1], weight.shape[1]])
    dx.view(len(rows), weight.shape[1]).index_copy_(0, live, linear(rows.index_select(0, live), weight.T))
    return dx


def _live_rows(rows: Tensor, weight: Tensor) -> Tensor | None:
    """Return which rows to multiply: those that are not zero, a few others; None where the rest would gain nothing."""
    # a GPU would have to be waited for
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or len(rows) * weight.numel() < _SMALLEST_PRODUCT:
        return None
    # the first feature of some tells of most; an odd step meets every token of samples of even length
    some = rows[:: len(rows) // _ROWS_SEEN | 1, 0]
    if 4 * int(some.count_nonzero()) > 3 * len(some):
        return None
    live = rows.any(1)
    count = -(-int(live.sum()) // _ROWS_AT_ONCE) * _ROWS_AT_ONCE
    return None if 4 * count > 3 * len(rows) else live.byte().argsort(descending=True, stable=True)[:count]


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Return dy.T @ x, the gradient of a linear layer's weight, in memory of its own; no gradient is recorded.

    dy: [M, O]; x: [M, I]; one dtype, fp32, bf16 or fp16. Returns fp32 [O, I], contiguous; summed in fp32.
    """
    if dy.shape[1] > x.shape[1]:
        # libraries want the narrower factor first: the other way round, few columns take up to 30 times as long
        return weight_gradient(x, dy).T.contiguous()
    if dy.is_cuda and dy.dtype != torch.float32:
        return torch.mm(dy.T, x, out_dtype=torch.float32)
    # gaps cost all libraries more than a copy, and oneDNN a thousand times the time
    dy, x = dy.float().contiguous(), x.float().contiguous()
    if torch.compiler.is_compiling():
        return torch.mm(dy.T, x)
    if len(x) * dy.shape[1] * x.shape[1] >= _SMALLEST_GRADIENT and _onednn_is_faster(x):
        gradient: Tensor = torch.ops.mkldnn._linear_pointwise(dy.T, x.T, None, "none", [], "")
        return gradient
    # what is given an `out` is not cast by autocast
    return torch.mm(dy.T, x, out=x.new_empty(dy.shape[1], x.shape[1]))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which autocast multiplies x; its own, where autocast is off."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else x.dtype


@functools.cache
def prefer_onednn() -> bool:
    """Return whether MKL would leave half of this processor idle, and torch has oneDNN."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return wide and has_onednn and torch.backends.mkl.is_available() and _vendor() == "AuthenticAMD"


def _onednn_is_faster(factor: Tensor) -> bool:
    return factor.device.type == "cpu" and factor.dtype == torch.float32 and prefer_onednn()


def _vendor() -> str:
    """Return who made the processor, as it says itself; "" where that cannot be found out."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
    return named or next((name for name in ("AuthenticAMD", "GenuineIntel") if name in platform.processor()), "")
