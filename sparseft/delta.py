"""Keep the difference: base + delta = fine-tuned, bit for bit, in both directions."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sparseft import files, ops  # noqa: F401  (ops registers torch.ops.sparseft)
from sparseft.mask import OTHERS_TRAINED, Mask, check_mask, fingerprint

_VALUES, _DENSE = "values.", "dense."


def save_delta(
    model: nn.Module,
    mask: Mask,
    path: str | os.PathLike[str],
    info: Mapping[str, Any] | None = None,
    *,
    check_weights: bool = True,
) -> None:
    """Write what it takes to rebuild a fine-tuned model from its base: selected entries and dense parameters.

    About 2 bytes an entry for its place and the parameter's own 2 or 4 for its value. Atomic: an older file survives.
    Buffers are not in it: layers that collect statistics, as batch norms do, must train in evaluation mode.

    Args:
        model: the fine-tuned model, as it is now.
        mask: what was trained; after `set_mask`, the union of all masks, the one made of the base first.
        path: the file to write, `.safetensors` by custom.
        info: plain JSON values to keep with the mask's own `info`.
        check_weights: compare parameters with nothing selected to the fingerprint of the base, which reads them once.

    Raises:
        ValueError: the mask is of another model, or something outside of it changed; nothing was written.
        OSError: the file could not be written; nothing at `path` was changed.
    """
    Delta.of(model, mask, info, check_weights=check_weights).save(path)


def _check_rest(model: nn.Module, mask: Mask) -> None:
    """Raise if a parameter with nothing selected is not what it was in the base: a delta could not rebuild it."""
    rest = [name for name in mask.fingerprint if name not in mask]
    now = fingerprint(model, rest)
    changed = [name for name in rest if now[name] != mask.fingerprint[name]]
    if changed:
        raise ValueError(
            f"{len(changed)} parameters changed in which nothing is selected, {changed[0]} the first: base and delta "
            "would not make this model. Optimizers of other packages train whole parameters outside of "
            "compact_gradients; after set_mask, save the union of the masks; and select in the dtype that is trained"
        )


class Delta:
    """A delta in memory: a mask, the values of its entries, and whole tensors of its dense parameters.

    Attributes:
        mask: which entries; `mask.info` says how they were chosen and trained.
        values: parameter name -> [k_i], the parameter's dtype.
        dense: parameter name -> whole tensor.
    """

    def __init__(self, mask: Mask, values: dict[str, Tensor], dense: dict[str, Tensor]):
        self.mask, self.values, self.dense = mask, values, dense

    @classmethod
    def of(
        cls, model: nn.Module, mask: Mask, info: Mapping[str, Any] | None = None, *, check_weights: bool = True
    ) -> Delta:
        """Return what `save_delta` writes: copies, which do not follow the model as it trains on.

        Raises:
            TypeError: the mask is none.
            ValueError: the mask is of another model, or something outside of it changed or was trained too.
        """
        check_mask(mask)
        mask.check(model)
        if mask.info.get(OTHERS_TRAINED):
            raise ValueError(
                "a schedule trained weights outside of this mask before: base and delta would not make this model; "
                "save the model whole, or a delta of the union of all its masks"
            )
        if check_weights:
            _check_rest(model, mask)
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        local = {name: index.to(parameters[name].device) for name, index in mask.items()}
        values = torch.ops.sparseft.gather([parameters[name] for name in local], list(local.values()))
        kept = copy.copy(mask)
        kept.info = {**mask.info, **(info or {})}
        dense = {name: parameters[name].clone() for name in mask.dense}
        return cls(kept, dict(zip(local, values, strict=True)), dense)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Delta:
        """Read a delta file. Safetensors only: reading never runs code.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no delta, is damaged, or its parts do not fit together.
        """
        tensors, header = files.load(path, "delta")
        mask = Mask.from_file_parts(tensors, header)
        values = {name: tensors.get(_VALUES + name, torch.empty(0)) for name in mask}
        dense = {name: tensors.get(_DENSE + name, torch.empty(0)) for name in mask.dense}
        short = [name for name in mask if values[name].shape != mask[name].shape]
        short += [name for name, shape in mask.dense.items() if tuple(dense[name].shape) != shape]
        if short:
            raise ValueError(f"{path} is damaged: values and indices differ in length for {short}; fetch it again")
        return cls(mask, values, dense)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the delta as `save_delta` does. Atomic: an older file survives.

        Raises:
            OSError: the file could not be written; nothing at `path` was changed.
        """
        tensors = {"indices." + name: files.encode_indices(index) for name, index in self.mask.items()}
        tensors |= {_VALUES + name: value for name, value in self.values.items()}
        tensors |= {_DENSE + name: whole for name, whole in self.dense.items()}
        files.save(path, "delta", tensors, self.mask.header())

    def apply(self, model: nn.Module, check_weights: bool = True) -> AppliedDelta:
        """Swap the delta into a model, in place.

        Args:
            model: the base model the delta was trained from.
            check_weights: compare the base's fingerprint too (reads every weight once); turn it off for speed when
                the same base was checked before.

        Raises:
            ValueError: names, shapes, dtypes or base weights differ; nothing was changed.
        """
        self.mask.check(model)
        parameters = dict(model.named_parameters())
        stored = {**self.values, **self.dense}
        other = [name for name, value in stored.items() if value.dtype != parameters[name].dtype]
        if other:
            name = other[0]
            raise ValueError(
                f"{name} is {parameters[name].dtype} in the model and {stored[name].dtype} in the delta; load the "
                "model in the dtype it was trained in"
            )
        if check_weights:
            self.mask.check(model, weights=True)
        return AppliedDelta(self, parameters)


class AppliedDelta:
    """A delta in place. `restore()` puts the base back bit for bit; `swap()` goes back and forth.

    Also a context manager that restores on leaving. The values that are not in the model lie in buffers of their own:
    what was replaced is kept, never subtracted. Of several that are in place, the last one is to be restored first.
    """

    def __init__(self, delta: Delta, parameters: Mapping[str, nn.Parameter]):
        mask = delta.mask
        self._entries = [parameters[name].detach() for name in mask]
        self._indices = [mask.index_list(name).to(parameters[name].device) for name in mask]
        self._values = [delta.values[name].to(parameters[name].device, copy=True) for name in mask]
        self._wholes = [parameters[name].detach() for name in mask.dense]
        self._others = [delta.dense[name].to(parameters[name].device, copy=True) for name in mask.dense]
        self.info = mask.info
        self.active = False
        self.swap()

    def swap(self) -> None:
        """Exchange the delta's values and the model's."""
        torch.ops.sparseft.delta_swap_(self._entries, self._indices, self._values)
        # a backward pass through a forward pass from before is now an error, as after any change in place
        torch.autograd.graph.increment_version(self._entries)
        for whole, other in zip(self._wholes, self._others, strict=True):
            replaced = whole.clone()
            whole.copy_(other)
            other.copy_(replaced)
        self.active = not self.active

    def restore(self) -> None:
        """Put the base weights back; nothing happens if they are."""
        if self.active:
            self.swap()

    def __enter__(self) -> AppliedDelta:
        if not self.active:
            self.swap()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def load_delta(model: nn.Module, path: str | os.PathLike[str]) -> AppliedDelta:
    """Read a delta file and swap it into the base model it was trained from.

    Returns:
        A handle whose `restore()` puts the base back, bit for bit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no delta or is damaged, or the model is not its base; nothing was changed.
    """
    return Delta.load(path).apply(model)
