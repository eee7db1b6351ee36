"""Squared per-sample gradients, summed over entries for samples and over samples for entries.

G[i, j] is the square of sample i's gradient at entry j. `Table` keeps G for the samples and entries that a search
starts from; `Stream` computes the part it is asked for. Both add rows up one after the other, so they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from sparseft.fisher.columns import ColumnPass
from sparseft.fisher.loss import Objective
from sparseft.selection.ird.pool import Pool

Weights = Mapping[int, float]  # of samples, by position in the data; 1 for those that are not there


class Layout:
    """Entries of many parameters as one sorted list: positions in the parameters laid end to end, int64."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.names = list(sizes)
        self.sizes = list(sizes.values())
        self._starts = torch.tensor([0, *self.sizes]).cumsum(0)

    def join(self, indices: Mapping[str, Tensor]) -> Tensor:
        """Return index lists as one."""
        starts = dict(zip(self.names, self._starts.tolist(), strict=False))
        parts = [indices[name].cpu().long() + starts[name] for name in self.names if name in indices]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def counts(self, entries: Tensor) -> list[int]:
        """Return how many of the entries each parameter has."""
        bounds = torch.searchsorted(entries, self._starts)
        return bounds.diff().tolist()

    def split(self, entries: Tensor) -> dict[str, Tensor]:
        """Return the entries as index lists, of the parameters that have any."""
        parts = entries.split(self.counts(entries))
        starts = self._starts.tolist()
        return {
            name: part - start for name, part, start in zip(self.names, parts, starts, strict=False) if part.numel()
        }


class Store(Protocol):
    """Gives sums of squared gradients."""

    def measure(self, samples: Sequence[int], entries: Tensor, weights: Weights) -> tuple[Tensor, dict[int, float]]:
        """Return the entries' sums over the samples, fp32 [k], and the samples' sums over the entries.

        samples: positions in the data, ascending; entries: of the Layout, sorted. A sample's gradients count with its
        weight in both.
        """


class Table:
    """G, for some samples and entries, in memory."""

    def __init__(self, pool: Pool, entries: Tensor, columns: ColumnPass, *, progress: bool) -> None:
        self._rows: dict[int, int] = {}
        self._entries = entries
        self._table = torch.empty(len(pool.positions), len(entries))

        def receive(positions: list[int], block: Tensor) -> None:
            first = len(self._rows)
            self._table[first : first + len(positions)] = block
            self._rows |= {position: first + row for row, position in enumerate(positions)}

        columns.run(pool, receive, progress=progress)

    def measure(self, samples: Sequence[int], entries: Tensor, weights: Weights) -> tuple[Tensor, dict[int, float]]:
        """Return sums over the samples and over the entries."""
        sums = _Sums(len(entries), weights)
        whole = len(entries) == len(self._entries)
        columns = None if whole else torch.searchsorted(self._entries, entries)
        for position in samples:
            if position not in self._rows:  # its gradient was not finite
                continue
            row = self._table[self._rows[position]]
            sums.add(position, row if columns is None else row[columns])
        return sums.of_entries, sums.of_samples


class Stream:
    """G, computed anew for the samples and entries asked for: a pass over these samples each time."""

    def __init__(self, model: nn.Module, pool: Pool, layout: Layout, objective: Objective, *, progress: bool) -> None:
        self._model, self._pool, self._layout, self._objective = model, pool, layout, objective
        self._progress = progress

    def measure(self, samples: Sequence[int], entries: Tensor, weights: Weights) -> tuple[Tensor, dict[int, float]]:
        """Return sums over the samples and over the entries."""
        sums = _Sums(len(entries), weights)

        def receive(positions: list[int], block: Tensor) -> None:
            for position, row in zip(positions, block.cpu(), strict=True):
                sums.add(position, row)

        columns = ColumnPass(self._model, self._layout.split(entries), self._objective, squared=True)
        columns.run(self._pool.only(samples), receive, progress=self._progress)
        return sums.of_entries, sums.of_samples


class _Sums:
    def __init__(self, entries: int, weights: Weights) -> None:
        self.of_entries = torch.zeros(entries)
        self.of_samples: dict[int, float] = {}
        self._weights = weights

    def add(self, position: int, row: Tensor) -> None:
        weight = self._weights.get(position, 1.0)
        self.of_entries.add_(row, alpha=weight)
        self.of_samples[position] = weight * float(row.sum(dtype=torch.float64))
