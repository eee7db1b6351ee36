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
from sparseft.mask import OTHERS_TRAINED, Mask, check_mask, fingerprint, fingerprint_of_rest

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
        check_weights: compare what is not selected to the fingerprint of the base, which reads every weight once.

    Raises:
        ValueError: the mask is of another model, something outside of it changed, or a value is NaN or infinite;
            nothing was written.
        OSError: the file could not be written; nothing at `path` was changed.
    """
    Delta.of(model, mask, info, check_weights=check_weights).save(path)


def _check_rest(model: nn.Module, mask: Mask) -> None:
    """Raise if what is not selected is not what it was in the base: a delta could not rebuild it."""
    base = {**{name: digest for name, digest in mask.fingerprint.items() if name not in mask}, **mask.rest}
    now = fingerprint(model, [name for name in base if name not in mask])
    now |= fingerprint_of_rest(model, mask) if mask.rest else {}
    changed = [name for name, digest in base.items() if now[name] != digest]
    if changed:
        raise ValueError(
            f"{len(changed)} parameters changed outside of the mask, {changed[0]} the first: base and delta would not "
            "make this model. Save the schedule's own mask after a schedule, and the union of all masks after "
            "set_mask; select in the dtype and from the weights that are trained; and use optimizers of other "
            "packages inside compact_gradients alone, for outside they train whole parameters"
        )


def _check_dtypes(stored: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, value in stored.items():
        if value.dtype != parameters[name].dtype:
            raise ValueError(
                f"{name} is {parameters[name].dtype} in the model and {value.dtype} in the delta; load the model in "
                "the dtype it was trained in, and restore a delta before converting the model"
            )


def check_values(delta: Delta, where: str = "") -> None:
    """Raise if a value of a delta is NaN or infinite. where: which delta, for the message."""
    for name, value in (*delta.values.items(), *delta.dense.items()):
        bad = int((~value.isfinite()).sum())
        if bad:
            raise ValueError(
                f"values of a delta must be finite, got {bad:,} of {value.numel():,} NaN or infinite in {name}{where};"
                " training diverged: train again with a lower learning rate, or from the last state that was good"
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
            ValueError: the mask is of another model, something outside of it changed or was trained too, or a value is
                NaN or infinite.
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
        delta = cls(kept, dict(zip(local, values, strict=True)), dense)
        check_values(delta)
        return delta

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
        _check_dtypes({**self.values, **self.dense}, dict(model.named_parameters()))
        if check_weights:
            self.mask.check(model, weights=True)
        return AppliedDelta(self, model)


class AppliedDelta:
    """A delta in place. `restore()` puts the base back bit for bit; `swap()` goes back and forth.

    Also a context manager that restores on leaving. The values that are not in the model lie in buffers of their own:
    what was replaced is kept, never subtracted. Of several that are in place, the last one is to be restored first.
    The model may be moved to another device in between, and get other parameters of the same names.
    """

    def __init__(self, delta: Delta, model: nn.Module):
        parameters = dict(model.named_parameters())
        self._model, self._mask = model, delta.mask
        self._values = {name: delta.values[name].to(parameters[name].device, copy=True) for name in delta.mask}
        self._others = {name: delta.dense[name].to(parameters[name].device, copy=True) for name in delta.mask.dense}
        self.info = delta.mask.info
        self.active = False
        self.swap()

    def swap(self) -> None:
        """Exchange the delta's values and the model's.

        Raises:
            ValueError: the model has other names, shapes or dtypes by now; nothing was changed.
        """
        mask, parameters = self._mask, dict(self._model.named_parameters())
        mask.check(self._model)
        _check_dtypes({**self._values, **self._others}, parameters)
        entries = [parameters[name].detach() for name in mask]
        self._values = {name: value.to(parameters[name].device) for name, value in self._values.items()}
        indices = [mask.index_list(name).to(parameters[name].device) for name in mask]
        torch.ops.sparseft.delta_swap_(entries, indices, list(self._values.values()))
        # a backward pass through a forward pass from before is now an error, as after any change in place
        torch.autograd.graph.increment_version(entries)
        for name, other in self._others.items():
            whole = parameters[name].detach()
            replaced = whole.clone()
            whole.copy_(other)
            other.copy_(replaced)
        self.active = not self.active

    def restore(self) -> None:
        """Put the base weights back; nothing happens if they are.

        Raises:
            ValueError: as `swap`.
        """
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
