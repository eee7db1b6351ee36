"""Selected entries of a parameter as a leaf of their own: what `compact_gradients` gives to optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SelectedEntries(nn.Parameter):
    """The selected entries of one parameter, fp32 [k]: a leaf whose gradient has k values too.

    To the world outside it is a parameter like any other. It holds more digits than a bf16 or fp16 parameter and
    doubles as its master copy.

    Attributes:
        dense: the parameter that the entries belong to.
        positions: int32 or int64 [k], where they lie in it: flat, sorted, unique; on its device.
        made_for: the parameter's shape, dtype and device when the leaf was made.
        place: the model and the parameter's name in it; None while its gradients are not compact.
    """

    dense: Tensor
    positions: Tensor
    made_for: tuple[torch.Size, torch.dtype, torch.device]
    place: tuple[nn.Module, str] | None
    _written: tuple[int, int]

    def __new__(cls, dense: Tensor, indices: Tensor) -> SelectedEntries:
        """Return the leaf of a parameter, whose memory it does not share."""
        values = dense.detach().reshape(-1)[indices.long()].float()
        entries: SelectedEntries = torch.Tensor._make_subclass(cls, values, True)
        entries.dense, entries.positions = dense, indices
        entries.made_for = dense.shape, dense.dtype, dense.device
        entries.place = None
        entries.mark_written()
        return entries

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
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        copied: nn.Parameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


def entries_of(parameter: Tensor) -> SelectedEntries | None:
    """Return the leaf of a parameter whose gradients are compact, None where they are not."""
    found: SelectedEntries | None = getattr(parameter, "selected_entries", None)
    return found


def check_no_entries(model: nn.Module) -> None:
    """Raise if a model's gradients are compact: scores are of whole parameters.

    Raises:
        RuntimeError: they are.
    """
    if any(isinstance(parameter, SelectedEntries) for parameter in model.parameters()):
        raise RuntimeError(
            "scores need the dense gradients of a model, and this one's are compact; leave compact_gradients first"
        )
