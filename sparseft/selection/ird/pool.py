"""The samples a search looks at, kept as batches of the caller's data, and those it must not look at."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from sparseft.fisher.batches import Batch, limited, take
from sparseft.fisher.sample_dim import SampleDim

Numbered = tuple[Batch, list[int]]


class Pool:
    """Batches with the positions of their samples in the data."""

    def __init__(self, batches: Sequence[Numbered]) -> None:
        self._batches = list(batches)

    @property
    def positions(self) -> list[int]:
        """Where the samples stand in the data."""
        return [position for _, positions in self._batches for position in positions]

    def __iter__(self) -> Iterator[Numbered]:
        return iter(self._batches)

    def only(self, positions: Collection[int]) -> Pool:
        """Return the pool of some of the samples."""
        wanted = set(positions)
        kept = []
        for batch, numbers in self._batches:
            rows = [row for row, position in enumerate(numbers) if position in wanted]
            if len(rows) == len(numbers):
                kept.append((batch, numbers))
            elif rows:
                kept.append((take(batch, rows), [numbers[row] for row in rows]))
        return Pool(kept)

    def labels(self) -> dict[int, int]:
        """Return each sample's class.

        Raises:
            ValueError: the data have no integer label a sample.
        """
        return self._by_sample(_label, "class_balance needs one integer label a sample")

    def lengths(self) -> dict[int, int]:
        """Return each sample's number of tokens.

        Raises:
            ValueError: the data have no attention mask.
        """
        return self._by_sample(_length, "length_normalisation needs an attention mask, [N, T]")

    def _by_sample(self, read: Any, need: str) -> dict[int, int]:
        found: dict[int, int] = {}
        for batch, positions in self._batches:
            values = read(batch)
            if values is None or values.dim() != 1 or values.is_floating_point():
                raise ValueError(f"{need}, and the batches have none; switch the option off")
            found |= dict(zip(positions, values.tolist(), strict=True))
        return found


def read(data: Iterable[Batch], samples: int, held_out: float, turned: SampleDim) -> tuple[Pool, Pool]:
    """Return the samples to search over, at most `samples`, and those held out: the rest of what was read.

    held_out: share of all samples read, in [0, 1). Where the data hold fewer, both get their share of what there is.
    """
    total = samples + (math.ceil(samples * held_out / (1 - held_out)) if held_out else 0)
    batches = list(limited(data, total, turned.first))
    found = sum(len(positions) for _, positions in batches)
    first = samples if found == total else max(1, round(found * (1 - held_out)))
    if held_out and first == found:
        raise ValueError(
            f"the data must hold samples to search over and samples to hold out, got {found}; give more, or pass an "
            "evaluator, or select_by='fisher_mass'"
        )
    whole = Pool(batches)
    positions = whole.positions
    return whole.only(positions[:first]), whole.only(positions[first:])


def _label(batch: Batch) -> Tensor | None:
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1] if len(batch) == 2 else None
    return labels.reshape(-1) if isinstance(labels, Tensor) and labels.numel() == len(labels) else None


def _length(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.long().flatten(1).sum(1) if isinstance(mask, Tensor) else None
