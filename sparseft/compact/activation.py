"""Turning compact gradients on and off: what is changed in a model, and how it is put back."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from types import TracebackType

import torch
from torch import nn

from sparseft.compact import stepping
from sparseft.compact.changes import (
    hidden_from_ddp,
    leaves_registered,
    made_compact,
    replacements_followed,
    rest_frozen,
)
from sparseft.compact.selection import Selection
from sparseft.entries import SelectedEntries, entries_of
from sparseft.mask import Mask, check_mask

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def compact_gradients(model: nn.Module, mask: Mask, *, values: bool = True) -> CompactGradients:
    """Return a context in which backward computes the gradients of a mask's entries, and no dense weight gradient.

    Inside, each selected parameter has a leaf of its selected entries, which gets its gradients: a parameter of
    k values, registered with the model, whose gradient has k values too. `mask.param_groups(model)` gives these leaves
    to any torch optimizer; `model.parameters()` has them for clipping, DDP and logging. After an optimizer's step the
    model's weights have what the leaves have. `state_dict()` does not show them.

    Linear layers, transformers' Conv1D and embeddings compute no more than what is selected. For other parameters one
    dense gradient at a time is made, gathered and freed. What the mask leaves out is frozen. On leaving, the model is
    as before but for its weights. Entered again with an equal mask, it has the same leaves: an optimizer goes on.
    A selected parameter that is frozen stops training, and stays frozen on leaving; unfrozen, it goes on.

    Args:
        model: fp32, bf16 or fp16; already on its device, not yet wrapped by DDP or compiled.
        mask: what trains; parameters in `mask.dense` train whole, as they would without this. A mask of these
            alone will do.
        values: whether leaves hold the values of their entries, in fp32. Without, they and their gradients have the
            parameter's dtype and leaves take no memory; only optimizers of this package train them then, and a bf16 or
            fp16 parameter wants rounding="stochastic" from these.

    Raises:
        RuntimeError: compact gradients of another mask are active, or with leaves of the other kind, or parameters
            share memory unexpectedly.
        TypeError: a selected parameter is of a dtype or class that is not served, as quantised ones are.
        ValueError: the mask is of another model, or nothing of it trains.
    """
    return CompactGradients(model, mask, values)


class CompactGradients:
    """A model whose gradients are compact while the context is entered; made by `compact_gradients`.

    Attributes:
        entries: parameter name -> its leaf; empty before the context is entered for the first time.
    """

    def __init__(self, model: nn.Module, mask: Mask, values: bool = True) -> None:
        # torch.compile runs the module that it wraps
        model = getattr(model, "_orig_mod", model)
        _check_model(model, mask)
        self.entries: dict[str, SelectedEntries] = {}
        self._model, self._mask, self._values = model, mask, values
        self._entered = 0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> CompactGradients:
        if self._entered == 0:
            self._activate()
        self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered == 0:
            self._undo.close()

    def _activate(self) -> None:
        _check_model(self._model, self._mask)
        parameters = {name: p for name, p in self._model.named_parameters() if name in self._mask}
        outer = _active.get(self._model)
        if outer is not None:
            if outer._mask != self._mask or outer._values != self._values:
                raise RuntimeError(
                    f"compact gradients of another mask are active, or with other leaves: {outer._mask}, "
                    f"values={outer._values}, got {self._mask}, values={self._values}; leave that context first"
                )
            self.entries = outer.entries
            return
        made = _made.get(self._model)
        if not self.entries and made is not None and made[:2] == (self._mask, self._values):
            self.entries = made[2]
        _check_parameters(self._model, parameters, self.entries)
        with contextlib.ExitStack() as undo:
            for name, parameter in parameters.items():
                if name in self.entries:
                    stepping.refresh([self.entries[name]])
                    self.entries[name].requires_grad_(parameter.requires_grad)
                else:
                    self.entries[name] = SelectedEntries(
                        parameter, self._mask.index_list(name).to(parameter.device), self._values
                    )
            whole = {name: p for name, p in self._model.named_parameters() if name in self._mask.dense}
            required = {name: p.requires_grad for name, p in self._model.named_parameters()}
            undo.enter_context(rest_frozen(self._model, self._mask))
            for name, parameter in parameters.items():
                selection = Selection.of(parameter, self.entries[name])
                undo.enter_context(made_compact(parameter, selection))
            undo.enter_context(leaves_registered(self._model, self.entries, required))
            undo.enter_context(hidden_from_ddp(self._model, self.entries))
            undo.enter_context(stepping.following(self._model, self.entries, whole))
            undo.enter_context(replacements_followed(self._model, self._mask, self.entries))
            undo.enter_context(_registered(self))
            self._undo = undo.pop_all()
        _made[self._model] = self._mask, self._values, self.entries


# model -> the leaves that were made for it last, with mask and kind: entered again with equal ones, it has the same
_made: weakref.WeakKeyDictionary[nn.Module, tuple[Mask, bool, dict[str, SelectedEntries]]] = (
    weakref.WeakKeyDictionary()
)
_active: weakref.WeakKeyDictionary[nn.Module, CompactGradients] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _registered(compact: CompactGradients) -> Iterator[None]:
    _active[compact._model] = compact
    try:
        yield
    finally:
        del _active[compact._model]


def _check_model(model: nn.Module, mask: Mask) -> None:
    """Raise unless the mask is the model's and something trains, and the model is not wrapped."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise TypeError(
            f"model must not be wrapped yet, got {type(model).__name__}; enter the context with the model inside, "
            "then wrap it"
        )
    check_mask(mask)
    mask.check(model)
    if not len(mask) and not mask.dense:
        raise ValueError(
            "the mask has neither selected entries nor dense parameters: nothing would train; select some"
        )


def _check_parameters(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], entries: Mapping[str, SelectedEntries]
) -> None:
    """Raise unless every selected parameter is of a kind that is served, and has its memory for itself."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        # of storages without memory (meta tensors) nothing can be said
        address = parameter.untyped_storage().data_ptr() if parameter.device.type != "meta" else 0
        other = owners.setdefault(address, name) if address else name
        if other != name and (name in parameters or other in parameters):
            raise RuntimeError(
                f"{name} and {other} share memory but are two parameters; tie them, or give one a copy of its own"
            )
    for name, parameter in parameters.items():
        if entries_of(parameter) is not None:
            raise RuntimeError(f"compact gradients of {name} are active in another model; leave that context first")
        if type(parameter) is not nn.Parameter:
            raise TypeError(
                f"{name} must be a plain parameter, got {type(parameter).__name__}; quantised and sharded weights "
                "have no compact gradients: leave them out of the mask"
            )
        if parameter.dtype not in _FLOATS or not parameter.is_contiguous():
            raise TypeError(
                f"{name} must be contiguous and fp32, bf16 or fp16, got {parameter.dtype} {parameter.stride()}; "
                "leave it out of the mask"
            )
        if not parameter.requires_grad and name not in entries:
            raise ValueError(
                f"{name} has selected entries but is frozen (requires_grad=False); unfreeze it or select again"
            )
        if name in entries and entries[name].dense is not parameter:
            raise RuntimeError(f"{name} is another parameter than before; make a new context with compact_gradients")
