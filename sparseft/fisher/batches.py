"""Batches, any nest of mappings and tuples of tensors: how many samples one holds, taking some, moving them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Any


def limited(
    data: Iterable[Batch], samples: int | None, turn: Callable[[Batch], Batch] | None = None
) -> Iterator[tuple[Batch, list[int]]]:
    """Yield (batch, positions of its samples in the data) until `samples` samples were given out; None means all.

    The last batch is cut, so that exactly `samples` are used, all of them if there are fewer.
    turn: brings the samples of a batch into the first dimension of each tensor.
    """
    if isinstance(data, (Mapping, str, Tensor)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be an iterable of batches (a DataLoader, a list), got {type(data).__name__}; "
            "put a single batch in a list"
        )
    used = 0
    for batch in data:
        batch = batch if turn is None else turn(batch)
        count = size(batch)
        if not count:
            continue
        if samples is not None and used + count > samples:
            count = samples - used
            batch = take(batch, range(count))
        yield batch, list(range(used, used + count))
        used += count
        if used == samples:
            return
    if not used:
        raise ValueError("data must hold at least one sample, got none; check the data set and its filters")


def size(batch: Batch) -> int:
    """Return the number of samples N: the leading size of the batch's tensors; a leading 1 is shared by all."""
    leading = {tensor.shape[0] for tensor in tensors(batch).values() if tensor.dim()}
    if not leading:
        raise ValueError("a batch must hold tensors with a leading sample dimension, got none; collate before scoring")
    if len(leading - {1}) > 1:
        raise ValueError(
            f"all tensors of a batch must have the same leading size, got {sorted(leading)}; "
            "make the sample dimension the first one of each, or name it with `batch_dim`"
        )
    return max(leading)


def take(batch: Batch, samples: Iterable[int]) -> Batch:
    """Return a batch of the given samples, in the given order."""
    count, index = size(batch), torch.tensor(list(samples), dtype=torch.long)

    def one(tensor: Tensor, path: str) -> Tensor:
        return tensor[index.to(tensor.device)] if tensor.dim() and tensor.shape[0] == count else tensor

    return each(batch, one)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor."""
    return each(batch, lambda tensor, path: tensor.to(device, non_blocking=True))


def nbytes(batch: Batch) -> int:
    """Return the bytes its tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(batch).values())


def tensors(batch: Batch) -> dict[str, Tensor]:
    """Return its tensors, path -> tensor: "labels", "0" for the first of a tuple, "inputs.mask" for one of a nest."""
    found: dict[str, Tensor] = {}
    each(batch, lambda tensor, path: found.setdefault(path, tensor))
    return found


def each(batch: Batch, function: Callable[[Tensor, str], Tensor], path: str = "") -> Batch:
    """Return the batch with every tensor replaced by function(tensor, path)."""
    if isinstance(batch, Tensor):
        return function(batch, path)
    if isinstance(batch, Mapping):
        return {key: each(value, function, _joined(path, key)) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [each(value, function, _joined(path, index)) for index, value in enumerate(batch)]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if batch is None or isinstance(batch, (bool, int, float)):
        return batch
    raise TypeError(
        f"a batch must be made of tensors, got {type(batch).__name__}; tokenize text and drop the columns that the "
        "model does not take"
    )


def _joined(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
