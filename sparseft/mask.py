"""Which weights train: one sorted index list a parameter, and how it was chosen."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.metadata
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseft import files
from sparseft.entries import SelectedEntries, entries_of, is_leaf
from sparseft.index_lists import PACKED, check_packed, count, index_dtype, positions, smallest

_PREFIX = "indices."
_SHOWN = 3  # names in a repr
_BLOCK = 1 << 18  # elements

# in the info of a mask that a schedule chose: it trained weights outside of it before
OTHERS_TRAINED = "others_trained"


class Mask(Mapping[str, Tensor]):
    """Selected entries of a model's parameters: a mapping from parameter name to index list.

    Index lists are flat positions in C order, sorted, unique; int32, or int64 for a parameter of 2^31 elements or
    more. They are kept packed, at about two bytes an entry, and unpacked on access. Names are the model's own; tied
    parameters appear once, under their first name.

    Args:
        indices: parameter name -> int32 or int64 [k_i], sorted and unique, or the same packed.
        shapes: parameter name -> shape, for every selectable parameter, also those with nothing selected: together
            they are the `n` that density is counted in.
        dense: parameter name -> shape of the parameters that train whole, outside the budget (a new head, say).
        aliases: other names of tied parameters -> the name they appear under.
        info: how the mask was made (method, options, seed, samples, density asked); plain JSON values.
        fingerprint: parameter name -> hash of the base model's weights, from `fingerprint`.
        rest: parameter name -> hash of what is not selected of it, from `fingerprint_of_rest`; where it is known.

    Raises:
        TypeError: an index list is not an integer tensor, or dense is no mapping.
        ValueError: an index list is unsorted, repeats, or leaves its parameter, or names are missing from shapes.
    """

    def __init__(
        self,
        indices: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        *,
        dense: Mapping[str, Sequence[int]] | None = None,
        aliases: Mapping[str, str] | None = None,
        info: Mapping[str, Any] | None = None,
        fingerprint: Mapping[str, str] | None = None,
        rest: Mapping[str, str] | None = None,
    ):
        if dense is not None and not isinstance(dense, Mapping):
            raise TypeError(
                f"dense must map parameter names to shapes, got {dense!r}; patterns are for sparseft.select, which "
                "knows the model"
            )
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.dense = {name: tuple(shape) for name, shape in (dense or {}).items()}
        self.aliases = dict(aliases or {})
        self.info = dict(info or {})
        self.fingerprint = dict(fingerprint or {})
        self.rest = dict(rest or {})
        unknown = sorted(set(indices) - set(self.shapes)) + sorted(set(self.shapes) & set(self.dense))
        if unknown:
            raise ValueError(f"every masked parameter must have one shape and not be dense too, got {unknown}")
        self._indices = {
            name: check_indices(name, index, math.prod(self.shapes[name]))
            for name, index in indices.items()
            if count(index, math.prod(self.shapes[name]))
        }

    def __getitem__(self, name: str) -> Tensor:
        return positions(self._indices[name], math.prod(self.shapes[name]))

    def index_list(self, name: str) -> Tensor:
        """Return a parameter's index list as it is kept and as ops take it: packed where that is smaller."""
        return self._indices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        same_names = self.shapes == other.shapes and self.dense == other.dense and self.keys() == other.keys()
        return same_names and all(torch.equal(self[name].cpu(), other[name].cpu()) for name in self)

    __hash__ = None  # type: ignore[assignment]

    @property
    def k(self) -> int:
        """Number of selected entries, dense parameters not counted."""
        return sum(count(index, math.prod(self.shapes[name])) for name, index in self._indices.items())

    @property
    def n(self) -> int:
        """Number of entries that could have been selected."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def density(self) -> float:
        """Selected over selectable entries, in (0, 1]."""
        return self.k / self.n

    @property
    def trained(self) -> int:
        """Number of weights that train: the selected entries and the dense parameters."""
        return self.k + sum(math.prod(shape) for shape in self.dense.values())

    def __repr__(self) -> str:
        how = self.info.get("method", "indices")
        more = f" and {len(self.dense) - _SHOWN} more" if len(self.dense) > _SHOWN else ""
        dense = f", dense={list(self.dense)[:_SHOWN]}{more}" if self.dense else ""
        return f"Mask({how}: {self.k:,} of {self.n:,} entries, density {self.density:.4%}, {len(self)} tensors{dense})"

    def union(self, other: Mask) -> Mask:
        """Return the entries that are in either mask. Both must be of the same parameters.

        The fingerprint is this mask's: of two that were made in the course of a training, begin with the first one.
        """
        self._same_parameters(other)
        return self._combined(other, lambda both, counts: both)

    def intersection(self, other: Mask) -> Mask:
        """Return the entries that are in both masks. Both must be of the same parameters."""
        self._same_parameters(other)
        return self._combined(other, lambda both, counts: both[counts == 2])

    def overlap(self, other: Mask) -> float:
        """Return which share of the smaller mask's entries is in the other too, in [0, 1]."""
        smaller = min(self.k, other.k)
        return self.intersection(other).k / smaller if smaller else 0.0

    def to(self, device: torch.device | str) -> Mask:
        """Return the mask with its index lists on a device."""
        return self._like({name: index.to(device) for name, index in self._indices.items()})

    def check(self, model: nn.Module, weights: bool = False) -> None:
        """Raise unless the mask fits a model: same names and shapes and, if asked, the same base weights.

        Raises:
            ValueError: says which names, shapes or weights differ.
        """
        parameters = dict(model.named_parameters())
        wanted = {**self.shapes, **self.dense}
        missing = [name for name in wanted if name not in parameters]
        resized = [
            f"{name} is {list(parameters[name].shape)}, not {list(shape)}"
            for name, shape in wanted.items()
            if name in parameters and tuple(parameters[name].shape) != shape
        ]
        if missing or resized:
            raise ValueError(
                f"the mask is of another model: missing parameters {_some(missing)}, other shapes {_some(resized)}; "
                "use it with the model it was made for"
            )
        if weights and self.fingerprint:
            now = fingerprint(model, self.fingerprint)
            changed = [name for name, digest in self.fingerprint.items() if now[name] != digest]
            if changed:
                raise ValueError(
                    f"the base weights differ in {len(changed)} of {len(now)} parameters: {_some(changed)}; load the "
                    "model the mask was made for, and restore deltas that are applied to it"
                )

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer of this package: `selected`, and `dense` if there is any.

        Each holds its parameters and, beside them, their index lists as `index_list` has them, on the parameters'
        devices. Optimizers of other packages do not know of these: they would train whole parameters. While the
        model's gradients are compact, `selected` holds the leaves of selected entries in place of parameters and index
        lists, for an optimizer of any package.

        Raises:
            ValueError: the mask is of another model, or a masked parameter is frozen.
        """
        self.check(model)
        parameters = dict(model.named_parameters())
        dense = {"name": "dense", "params": [parameters[name] for name in self.dense], "indices": None}
        leaves = {name: entries_of(parameters[name]) for name in self._indices}
        if any(leaf is not None for leaf in leaves.values()):
            selected = {"name": "selected", "params": self._checked_leaves(leaves)}
            del dense["indices"]
            return [group for group in (selected, dense) if group["params"]]
        frozen = [name for name in (*self._indices, *self.dense) if not parameters[name].requires_grad]
        if frozen:
            raise ValueError(
                f"masked parameters must have requires_grad=True, got frozen {_some(frozen)}; they were frozen after "
                "the selection: unfreeze them or select again"
            )
        selected = {
            "name": "selected",
            "params": [parameters[name] for name in self._indices],
            "indices": [index.to(parameters[name].device) for name, index in self._indices.items()],
        }
        return [group for group in (selected, dense) if group["params"]]

    def _checked_leaves(self, leaves: Mapping[str, SelectedEntries | None]) -> list[SelectedEntries]:
        """Return the leaves of parameters with compact gradients, if they are those of this mask's entries."""
        found = []
        for name, leaf in leaves.items():
            if leaf is None or not torch.equal(leaf.index_list.cpu(), self._indices[name].cpu()):
                raise ValueError(
                    f"the compact gradients that are active are of another mask: {name} has other entries; use the "
                    "mask that compact_gradients was given, or leave it and enter it with this one"
                )
            found.append(leaf)
        return found

    def freeze_rest(self, model: nn.Module) -> None:
        """Set requires_grad=False on parameters with nothing selected: their gradients would be computed for nothing.

        The parameters of the mask stay as they are.
        """
        self.check(model)
        for name, parameter in model.named_parameters():
            mine = name in self._indices or name in self.dense or is_leaf(parameter)
            if not mine:
                parameter.requires_grad_(False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as safetensors, about two bytes an entry. Atomic: an older file survives a failure."""
        tensors = {_PREFIX + name: files.encode_indices(index) for name, index in self.items()}
        files.save(path, "mask", tensors, self.header())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """Read a mask.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no mask, or damaged.
        """
        tensors, header = files.load(path, "mask")
        return cls.from_file_parts(tensors, header)

    def header(self) -> dict[str, Any]:
        """Return everything but the index lists, as plain JSON values, the way files keep it."""
        return {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "dense": {name: list(shape) for name, shape in self.dense.items()},
            "aliases": self.aliases,
            "info": self.info,
            "fingerprint": self.fingerprint,
            "rest": self.rest,
        }

    @classmethod
    def from_file_parts(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Mask:
        """Build a mask from the tensors named `indices.*` and the header of a file."""
        try:
            shapes = {name: tuple(map(int, shape)) for name, shape in header["shapes"].items()}
            indices = {
                name: files.decode_indices(tensors[_PREFIX + name], math.prod(shape))
                for name, shape in shapes.items()
                if _PREFIX + name in tensors
            }
            extra = {key: header[key] for key in ("dense", "aliases", "info", "fingerprint", "rest")}
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"the file's header is incomplete ({error!r}); it is damaged, fetch it again") from error
        stray = [name for name in tensors if name.startswith(_PREFIX) and name[len(_PREFIX) :] not in shapes]
        if stray:
            raise ValueError(f"the file holds index lists of unknown parameters {_some(stray)}; it is damaged")
        return cls(indices, shapes, **extra)

    def _like(self, indices: Mapping[str, Tensor]) -> Mask:
        return Mask(
            indices,
            self.shapes,
            dense=self.dense,
            aliases=self.aliases,
            info=self.info,
            fingerprint=self.fingerprint,
            rest=self.rest,
        )

    def _same_parameters(self, other: Mask) -> None:
        if self.shapes != other.shapes:
            names = sorted(
                name for name in {*self.shapes, *other.shapes} if self.shapes.get(name) != other.shapes.get(name)
            )
            raise ValueError(f"masks must be of the same parameters, got differences in {_some(names)}")

    def _combined(self, other: Mask, keep: Any) -> Mask:
        indices = {}
        for name in self.shapes:
            lists = [mask[name].cpu() for mask in (self, other) if name in mask]
            if lists:
                indices[name] = keep(*torch.cat(lists).unique(return_counts=True))
        return Mask(indices, self.shapes, dense=self.dense, aliases=self.aliases, fingerprint=self.fingerprint)


def check_indices(name: str, index: Tensor, numel: int) -> Tensor:
    """Return the smallest form of an index list, packed or not, or raise if it is not sorted, unique and in range."""
    if index.dtype == PACKED:
        check_packed(name, index, numel)
        _check_positions(name, positions(index, numel), numel)
        return index
    if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
        raise TypeError(f"indices of {name} must be int32 or int64 [k], got {index.dtype} {list(index.shape)}")
    _check_positions(name, index, numel)
    kept = smallest(index.to(index_dtype(numel)), numel)
    # a slice of a longer list would keep all of that in memory
    return kept.clone() if kept.untyped_storage().nbytes() > kept.nbytes else kept


def _check_positions(name: str, index: Tensor, numel: int) -> None:
    if index.numel():
        low, high = int(index[0]), int(index[-1])
        if bool((index[1:] <= index[:-1]).any()):
            raise ValueError(f"indices of {name} must be sorted and unique; use index.unique()")
        if low < 0 or high >= numel:
            raise ValueError(f"indices of {name} must lie in [0, {numel}), got {low}..{high}; is it another model's?")


def check_mask(mask: object) -> None:
    """Raise unless an argument is a mask."""
    if not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be a sparseft.Mask, got {type(mask).__name__}; select makes one, and Mask.load reads one from "
            "a file"
        )


def fingerprint(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return parameter name -> a 64-bit hash of its bytes (blake2b), of every parameter or of those named."""
    parameters = dict(model.named_parameters())
    return {name: _digest(parameters[name]) for name in (parameters if names is None else names)}


def fingerprint_of_rest(model: nn.Module, mask: Mask) -> dict[str, str]:
    """Return parameter name -> a hash of what a mask leaves as it is, of every parameter with selected entries.

    It is of the parameter's bytes with zeros in place of the selected entries.
    """
    parameters = dict(model.named_parameters())
    return {name: _digest_of_rest(parameters[name], index) for name, index in mask.items()}


def with_rest(mask: Mask, model: nn.Module) -> Mask:
    """Have a mask know what it leaves of its base, so that no delta is made where that changed; return it."""
    mask.rest = fingerprint_of_rest(model, mask)
    return mask


def aliases(model: nn.Module) -> dict[str, str]:
    """Return the other names of tied parameters -> the first name, which `named_parameters` lists."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def match_names(patterns: str | Iterable[str] | None, names: Iterable[str], argument: str) -> list[str]:
    """Return the names that match any shell-style pattern, in their order; None is no pattern.

    Raises:
        ValueError: a pattern matches nothing.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(() if patterns is None else patterns)
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"{argument} pattern {pattern!r} matches no parameter; names are like {_some(names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def versions() -> dict[str, str]:
    """Return the versions that belong into what is saved."""
    # torch's is of a class of its own, which a file of plain values cannot have
    return {"sparseft": importlib.metadata.version("sparseft"), "torch": str(torch.__version__)}


def _digest(parameter: Tensor) -> str:
    data = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=8).hexdigest()


def _digest_of_rest(parameter: Tensor, index: Tensor) -> str:
    whole, index = parameter.detach().cpu().reshape(-1), index.cpu().long()
    bounds = torch.searchsorted(index, torch.arange(0, len(whole) + _BLOCK, _BLOCK)).tolist()
    digest = hashlib.blake2b(digest_size=8)
    # block by block: a copy of a whole embedding would be the most memory that a choice takes
    for place, block in enumerate(whole.split(_BLOCK)):
        kept = block.clone()
        kept[index[bounds[place] : bounds[place + 1]] - place * _BLOCK] = 0
        digest.update(kept.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"[{shown}, and {len(names) - 4} more]" if len(names) > 4 else f"[{shown}]"
