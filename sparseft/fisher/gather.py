"""Operations whose result depends on values: rows chosen by content no longer lie sample after sample.

As in a mixture of experts, where the rows of one expert come from whichever samples chose it. Their number may fit the
batch by accident, in the probe too. So once such an operation ran, [rows, H] is not captured; [N, T, H] still is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparseft.fisher.capture import Capture


def _chosen(capture: Capture, *args: Any, **kwargs: Any) -> None:
    capture.rows_chosen = True


def _where(capture: Capture, condition: Tensor, *values: Any, **kwargs: Any) -> None:
    if not values and not kwargs:
        capture.rows_chosen = True


def _getitem(capture: Capture, tensor: Tensor, index: Any) -> None:
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in parts):
        capture.rows_chosen = True


_TENSOR = torch.Tensor
WATCHED: dict[Callable[..., Any], Callable[..., None]] = {
    **dict.fromkeys((torch.nonzero, _TENSOR.nonzero, torch.masked_select, _TENSOR.masked_select), _chosen),
    **dict.fromkeys((torch.unique, _TENSOR.unique, _TENSOR.item, _TENSOR.tolist, _TENSOR.numpy), _chosen),
    **dict.fromkeys((torch.where, _TENSOR.where), _where),
    _TENSOR.__getitem__: _getitem,
}
