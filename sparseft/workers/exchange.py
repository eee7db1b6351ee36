"""Merging in processes that train at once: each sends its selected values, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparseft.delta import Delta
from sparseft.entries import is_leaf
from sparseft.mask import Mask, check_mask
from sparseft.workers.merging import Overlap, merge

_DIGEST = 16


def exchange(
    model: nn.Module,
    masks: Sequence[Mask],
    *,
    overlap: Overlap = "error",
    weights: Sequence[float] | None = None,
    check_weights: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Delta:
    """Merge what the processes of a group learned into the model of each: afterwards all have the same weights.

    Every process calls it with its model and the same list of masks, of which it trained the one of its rank. Each
    sends its selected values and its dense parameters in their own dtype, filled up to the size of the largest, and 32
    bytes of checksums; index lists are known to all. The result is that of `merge`, bit for bit. Optimizers and
    `compact_gradients` may go on: weights that were changed from outside win over their copies. A delta has no
    buffers, so they stay each process's own.

    Args:
        model: this process's model, not wrapped: with averaged gradients there would be nothing to merge.
        masks: one a process, in the order of ranks.
        overlap: as for `merge`; with "mean", all may train the same mask.
        weights: as for `merge`.
        check_weights: compare what no mask selects among processes, which reads every weight once.
        group: of processes; all if left out.

    Returns:
        What was merged, relative to the weights that the round began with.

    Raises:
        RuntimeError: there is no process group.
        ValueError: masks are not one a process, are of another model, or differ among processes; weights that nobody
            trains differ; a process has no delta, its values are NaN for instance; or what `merge` raises. It is
            raised in every process, and no model is changed.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("exchange needs a process group; call torch.distributed.init_process_group first")
    device = _device(model, group)
    options = {"overlap": overlap, "weights": weights, "check_weights": check_weights}
    masks, shares, own = _agreed(model, masks, options, device, group)
    parameters = dict(model.named_parameters())
    layouts = [_layout(mask, parameters) for mask in masks]
    length = max(sum(part.bytes for part in layout) for layout in layouts)
    mine = _bytes([*own.values.values(), *own.dense.values()]).to(device)
    received = _all_gathered(torch.cat([mine, mine.new_zeros(length - mine.numel())]), group)
    deltas = [_delta(*each) for each in zip(masks, layouts, received, strict=True)]
    merged = merge(deltas, overlap=overlap, weights=shares, partial=True)
    merged.apply(model, check_weights=False)
    return merged


class _Part(NamedTuple):
    """One tensor among the bytes that a process sends."""

    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def _layout(mask: Mask, parameters: Mapping[str, Tensor]) -> list[_Part]:
    """Return what a process sends of its mask: selected values, then dense parameters."""
    shapes = {name: mask[name].shape for name in mask} | {
        name: torch.Size(shape) for name, shape in mask.dense.items()
    }
    return [_Part(name, shape, parameters[name].dtype) for name, shape in shapes.items()]


def _bytes(tensors: Iterable[Tensor]) -> Tensor:
    """Return tensors of any dtypes one after the other: uint8 [n], on the CPU."""
    return torch.cat([torch.empty(0, dtype=torch.uint8), *(t.cpu().reshape(-1).view(torch.uint8) for t in tensors)])


def _delta(mask: Mask, layout: Sequence[_Part], received: Tensor) -> Delta:
    """Return the delta that a process sent."""
    chunks = received.cpu().split([*(part.bytes for part in layout), received.numel() - sum(p.bytes for p in layout)])
    # copied, because a tensor of another dtype must begin at a multiple of its size
    found = {
        part.name: chunk.clone().view(part.dtype).view(part.shape) for part, chunk in zip(layout, chunks, strict=False)
    }
    return Delta(mask, {name: found[name] for name in mask}, {name: found[name] for name in mask.dense})


def _agreed(
    model: nn.Module,
    masks: Sequence[Mask],
    options: Mapping[str, Any],
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> tuple[Sequence[Mask], list[float] | None, Delta]:
    """Return masks, weights of means and this process's delta.

    It raises, in every process, unless all have the same masks, options and untrained weights, and can go on.
    """
    digest, problem = bytes(2 * _DIGEST), None
    try:
        masks = list(masks)
        _check_masks(model, masks, dist.get_world_size(group))
        shares = None if options["weights"] is None else [float(weight) for weight in options["weights"]]
        own = Delta.of(model, masks[dist.get_rank(group)], check_weights=False)
        dtypes = {name: str(p.dtype) for name, p in model.named_parameters() if not is_leaf(p)}
        headers = [{**mask.header(), "info": None} for mask in masks]
        plan = json.dumps([{**options, "weights": shares}, dtypes, headers]).encode()
        lists = (mask[name] for mask in masks for name in mask)
        rest = _untrained(model, masks) if options["check_weights"] else ()
        digest = _hash(lists, plan) + _hash(rest)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        problem = error
    received = _all_gathered(torch.tensor(list(digest), dtype=torch.uint8, device=device), group)
    if problem is not None:
        raise problem
    for rank, other in enumerate(bytes(each.tolist()) for each in received):
        if other == bytes(2 * _DIGEST):
            raise ValueError(f"nothing was exchanged: process {rank} could not go on, and says why")
        if other[:_DIGEST] != digest[:_DIGEST]:
            raise ValueError(
                f"all processes must have the same masks, options and dtypes, got others in process {rank}; make "
                "masks from the same scores, or send those of one process to all"
            )
        if other != digest:
            raise ValueError(
                f"the weights that no mask selects differ in process {rank}; begin a round with the same weights, and "
                "train its masks alone"
            )
    return masks, shares, own


def _check_masks(model: nn.Module, masks: Sequence[Mask], processes: int) -> None:
    if len(masks) != processes:
        raise ValueError(f"masks must be one a process, {processes}, got {len(masks)}")
    for mask in masks:
        check_mask(mask)
        mask.check(model)


def _untrained(model: nn.Module, masks: Sequence[Mask]) -> Iterator[Tensor]:
    """Yield every parameter that is not dense, with zeros where a mask selects."""
    for name, parameter in model.named_parameters():
        if not is_leaf(parameter) and all(name not in mask.dense for mask in masks):
            flat = parameter.detach().reshape(-1).cpu()
            lists = [mask[name].cpu().long() for mask in masks if name in mask]
            yield flat.index_fill(0, torch.cat(lists), 0) if lists else flat


def _hash(tensors: Iterable[Tensor], text: bytes = b"") -> bytes:
    total = hashlib.blake2b(text, digest_size=_DIGEST)
    for tensor in tensors:
        total.update(_bytes([tensor]).numpy().data)
    return total.digest()


def _all_gathered(sent: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Return what each process sent, in the order of ranks."""
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, sent, group=group)
    return received


def _device(model: nn.Module, group: dist.ProcessGroup | None) -> torch.device:
    """Return where tensors to send must lie: beside the model, or, for gloo, on the CPU."""
    device = next(model.parameters()).device
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return torch.device("cpu") if backends.get(device.type, "gloo") == "gloo" else device
