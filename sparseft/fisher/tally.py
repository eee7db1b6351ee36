"""Adding up: what all uses of a parameter contribute is summed per sample, then squared, then added to its Fisher."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from sparseft.fisher import contribution
from sparseft.fisher.capture import Use
from sparseft.fisher.contribution import Contribution, Lookup, Outer, Vector
from sparseft.fisher.grouped import Grouped, add_grouped_
from sparseft.fisher.layout import Rows
from sparseft.fisher.patches import Patches, add_patches_
from sparseft.fisher.small_layers import SmallLayers

_FORM: dict[str, type[Contribution]] = {
    "linear": Outer,
    "conv": Patches,
    "experts": Grouped,
    "bmm": Grouped,
    "embedding": Lookup,
}


def form(use: Use) -> type[Contribution]:
    """Return the form of what a use contributes."""
    return _FORM.get(use.rule, Vector)


def mixed(uses: Collection[Use]) -> dict[str, str]:
    """Return the parameters whose uses cannot be added up, with the reason: all forms but linear with embedding."""
    forms: dict[str, set[type[Contribution]]] = {}
    rules: dict[str, set[str]] = {}
    rows: dict[str, set[Rows | None]] = {}
    for use in uses:
        forms.setdefault(use.name, set()).add(form(use))
        rules.setdefault(use.name, set()).add(use.rule)
        rows.setdefault(use.name, set()).add(use.rows)
    found = {
        name: f"used as {' and as '.join(sorted(rules[name]))}"
        for name, used in forms.items()
        if len(used) > 1 and used != {Outer, Lookup}
    }
    return {**found, **{name: "used in rows that overlap" for name, used in rows.items() if _overlap(used)}}


def _overlap(blocks: Collection[Rows | None]) -> bool:
    if None in blocks:
        return len(blocks) > 1
    ordered = sorted((block.start, block.stop) for block in blocks if block is not None)
    return any(before[1] > after[0] for before, after in pairwise(ordered))


class Squares:
    """A sink: adds the squares of per-sample gradients to sums, parameter name -> fp32 of its shape.

    norms: if given, it also adds each sample's squares, summed over all parameters, to what is there at its position.
    """

    def __init__(self, sums: Mapping[str, Tensor], norms: dict[int, float] | None = None) -> None:
        self._sums, self._norms = sums, norms

    def receiver(self, uses: list[Use], ignored: Collection[str], positions: list[int]) -> Tally:
        """Return what adds up the contributions of a batch."""
        return Tally(self._sums, uses, ignored, None if self._norms is None else Scores(self._norms, positions))

    def add_whole(self, positions: list[int], grads: Mapping[str, Tensor]) -> None:
        """Add the squares of some samples' gradients."""
        for name, rows in grads.items():
            sums = self._sums[name]
            for row in rows:
                sums.addcmul_(row, row)
            if self._norms is not None:
                norms = rows.reshape(len(rows), -1).square().sum(1, dtype=torch.float64).tolist()
                for position, norm in zip(positions, norms, strict=True):
                    self._norms[position] += norm


class Scores:
    """Sums of a batch's squares by sample, on the devices of the parameters until a backward pass is over."""

    def __init__(self, norms: dict[int, float], positions: list[int]) -> None:
        self._norms, self._positions = norms, positions
        self._sums: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Return what to add to: fp32 [N]."""
        if device not in self._sums:
            self._sums[device] = torch.zeros(len(self._positions), device=device)
        return self._sums[device]

    def finish(self) -> None:
        """Add all of it to the norms."""
        for sums in self._sums.values():
            for position, score in zip(self._positions, sums.tolist(), strict=True):
                self._norms[position] += score
        self._sums = {}


_Key = tuple[str, Rows | None]


class Tally:
    """Receives the contributions of one backward pass and adds them to `fisher`.

    A parameter used once is added at once and nothing is kept, but for small layers on a GPU, which wait for others.
    One used several times waits for its last use; a linear use that shares its parameter with an embedding (a tied
    head) leaves only the rows that are looked up. With `scores`, each sample's squares are also summed.
    """

    def __init__(
        self, fisher: Mapping[str, Tensor], uses: list[Use], ignored: Collection[str], scores: Scores | None = None
    ) -> None:
        self._fisher, self._scores = fisher, scores
        self._uses: dict[_Key, list[Use]] = {}
        for use in uses:
            if use.name not in ignored:
                self._uses.setdefault((use.name, use.rows), []).append(use)
        self._waiting: dict[_Key, _Waiting] = {}
        self._small = SmallLayers()

    def __call__(self, use: Use, part: Contribution) -> None:
        """Take one contribution."""
        key = use.name, use.rows
        if key not in self._uses:
            return
        if key not in self._waiting:
            fisher = self._fisher[use.name]
            own = fisher if use.rows is None else fisher[use.rows.start : use.rows.stop]
            scores = None if self._scores is None else self._scores.on(own.device)
            self._waiting[key] = _Waiting(own, self._uses[key], self._small, scores)
        waiting = self._waiting[key]
        waiting.take(use, part)
        if waiting.complete():
            self._waiting.pop(key).close()

    def finish(self) -> None:
        """Add what still waits for uses that backward did not reach: their gradient is zero."""
        for waiting in self._waiting.values():
            waiting.close()
        self._waiting.clear()
        self._small.flush()
        if self._scores is not None:
            self._scores.finish()


class _Waiting:
    """What has arrived of one parameter in this backward pass."""

    def __init__(self, fisher: Tensor, uses: list[Use], small: SmallLayers, scores: Tensor | None) -> None:
        self._fisher, self._scores = fisher, scores
        self._uses = uses
        self._small = small
        self._arrived = 0
        self._outers: list[Outer] = []
        self._outers_to_come = sum(form(use) is Outer for use in uses)
        self._patches: list[Patches] = []
        self._grouped: list[Grouped] = []
        self._lookups: dict[Use, Lookup] = {}
        self._rows: Tensor | None = None
        self._vector: Tensor | None = None

    def take(self, use: Use, part: Contribution) -> None:
        self._arrived += 1
        if isinstance(part, Outer):
            self._outers.append(part)
            self._outers_to_come -= 1
            if not self._outers_to_come:
                self._close_outers()
        elif isinstance(part, Patches):
            self._patches.append(part)
        elif isinstance(part, Grouped):
            self._grouped.append(part)
        elif isinstance(part, Lookup):
            self._lookups[use] = part
        else:
            grad = part.grad.to(self._fisher.device)
            self._vector = grad if self._vector is None else self._vector + grad

    def complete(self) -> bool:
        return self._arrived == len(self._uses)

    def close(self) -> None:
        if self._outers:
            self._close_outers()
        if self._patches:
            add_patches_(self._fisher, self._patches, self._scores)
        if self._grouped:
            add_grouped_(self._fisher, self._grouped, self._scores)
        if self._lookups:
            contribution.add_lookups_(self._fisher, self._all_lookups(), self._rows, self._scores)
        if self._vector is not None:
            contribution.add_vectors_(self._fisher, self._vector, self._scores)

    def _close_outers(self) -> None:
        ids = [use.ids for use in self._uses if use.ids is not None]
        if ids:
            self._rows = contribution.outer_rows(self._outers, torch.cat(ids, 1))
        left, right = contribution.joined_outers(self._outers)
        self._small.add(self._fisher, right, left, self._scores)
        self._outers = []

    def _all_lookups(self) -> list[Lookup]:
        # in the order of the uses, which is the order of `rows`; zero where backward did not come by
        zero = next(iter(self._lookups.values())).dy.new_zeros(1, 1, 1)
        return [
            self._lookups.get(use) or Lookup(use.ids, zero.expand(*use.ids.shape, self._fisher.shape[1]))
            for use in self._uses
            if use.ids is not None
        ]
