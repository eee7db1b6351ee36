"""Selected entries of a parameter as a leaf of their own: what `compact_gradients` gives to optimizers."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from sparseft import index_lists


class SelectedEntries(nn.Parameter):
    """The selected entries of one parameter, fp32 [k]: a leaf whose gradient has k values too.

    To the world outside it is a parameter like any other. It holds more digits than a bf16 or fp16 parameter and
    doubles as its master copy. A leaf without values, of the parameter's dtype, is there for its gradient alone: it
    takes no memory, and only optimizers that update the parameter itself can train it.

    Attributes:
        dense: the parameter that the entries belong to.
        index_list: where they lie in it, packed or not; on its device.
        has_values: whether the leaf holds any.
        made_for: the parameter's shape, dtype and device when the leaf was made.
        place: the model and the parameter's name in it; None while its gradients are not compact.
    """

    dense: Tensor
    index_list: Tensor
    has_values: bool
    made_for: tuple[torch.Size, torch.dtype, torch.device]
    place: tuple[nn.Module, str] | None
    _written: tuple[int, int]

    def __new__(cls, dense: Tensor, index_list: Tensor, has_values: bool = True) -> SelectedEntries:
        """Return the leaf of a parameter, whose memory it does not share."""
        if has_values:
            data = _selected(dense, index_list).float()
        else:
            data = dense.detach().new_zeros(()).expand(index_lists.count(index_list, dense.numel()))
        entries: SelectedEntries = torch.Tensor._make_subclass(cls, data, True)
        entries.dense, entries.index_list, entries.has_values = dense, index_list, has_values
        entries.made_for = dense.shape, dense.dtype, dense.device
        entries.place = None
        entries.mark_written()
        return entries

    @property
    def positions(self) -> Tensor:
        """Where the entries lie in the parameter: int32 or int64 [k], flat, sorted, unique."""
        return index_lists.positions(self.index_list, self.dense.numel())

    @property
    def is_master(self) -> bool:
        """Whether the leaf holds digits that its parameter has no room for."""
        return self.has_values and self.dense.dtype != torch.float32

    @property
    def changed(self) -> bool:
        """Whether the leaf was changed in place, or got other memory, since its values were the parameter's."""
        return self._written != (self._version, self.data_ptr())

    def mark_written(self) -> None:
        """Note that the leaf's values, rounded, are the parameter's."""
        self._written = self._version, self.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Copy the values alone: a copied optimizer is not tied to the model of the other."""
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self._values(), self.requires_grad)
        copied: nn.Parameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self._values(), self.requires_grad).__reduce_ex__(protocol)

    def _values(self) -> Tensor:
        return self.detach().clone() if self.has_values else _selected(self.dense, self.index_list)


def _selected(dense: Tensor, index_list: Tensor) -> Tensor:
    return dense.detach().reshape(-1)[index_lists.positions(index_list, dense.numel()).long()]


def is_leaf(parameter: Any) -> TypeGuard[SelectedEntries]:
    """Return whether a parameter is a leaf. Steps ask this often, and isinstance is slow about parameters."""
    return type(parameter) is SelectedEntries


def entries_of(parameter: Tensor) -> SelectedEntries | None:
    """Return the leaf of a parameter whose gradients are compact, None where they are not."""
    found: SelectedEntries | None = getattr(parameter, "selected_entries", None)
    return found


def check_no_entries(model: nn.Module) -> None:
    """Raise if a model's gradients are compact: scores and schedules are of whole parameters.

    Raises:
        RuntimeError: they are.
    """
    if any(is_leaf(parameter) for parameter in model.parameters()):
        raise RuntimeError(
            "scores and schedules need the dense gradients of a model, and this one's are compact; leave "
            "compact_gradients first"
        )
