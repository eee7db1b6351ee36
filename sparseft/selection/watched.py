"""The batches that a method looks at, beside a progress bar."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from tqdm.auto import tqdm

from sparseft.fisher.batches import Batch, limited


def first_samples(
    data: Iterable[Any], samples: int | None, *, progress: bool, description: str = "Gradients"
) -> Iterator[tuple[Batch, list[int]]]:
    """Yield (batch, positions of its samples) as `limited` does, and count samples on a bar."""
    sizes = [] if samples is None else [samples]
    available = getattr(data, "dataset", None)
    if isinstance(available, Sized):
        sizes.append(len(available))
    with _bar(description, "sample", sizes, progress) as bar:
        for batch, positions in limited(data, samples):
            yield batch, positions
            bar.update(len(positions))


def first_batches(data: Iterable[Any], batches: int, *, progress: bool) -> Iterator[tuple[Batch, list[int]]]:
    """Yield the first batches with the positions of their samples, and count batches on a bar."""
    sizes = [batches, len(data)] if isinstance(data, Sized) else [batches]
    with _bar("Gradients", "batch", sizes, progress) as bar:
        for batch, positions in itertools.islice(limited(data, None), batches):
            yield batch, positions
            bar.update()


def _bar(description: str, unit: str, sizes: list[int], progress: bool) -> tqdm:
    return tqdm(total=min(sizes, default=None), desc=description, unit=unit, delay=2, disable=not progress)
