"""Keeping bad samples out: a sample whose gradient is not finite must leave no trace in the sums.

Whether a gradient is finite is known only when its backward pass is over; its finite parts are in the sums by then.
As long as all is well, batches are added to the sums directly and kept in a journal: token ids are far smaller
than a second copy of the Fisher. When the sums turn out not to be finite, or the journal outgrows them, every batch
goes through such a copy instead, and enters the sums only if it is finite; a batch that is not is redone sample by
sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparseft.fisher.batches import Batch, nbytes, take

# reading all sums takes about 1 % of a batch's time; a batch found bad costs a second run of the journal in any case
_CHECK_EVERY = 8

Add = Callable[[Mapping[str, Tensor], Batch, list[int]], list[int]]


class Sums(dict[str, Tensor]):
    """Name -> fp32 sums of a parameter's shape, zero at first, all made when the first is asked for.

    That is when the first backward pass begins. A heap holds the activations then, and the sums lie beyond them: they
    leave no gaps where the activations of the next batch go, and behind them a C library finds nothing to give back to
    the system after every batch, from which the next would have to take it again, page by page.

    Attributes:
        changing: a sum was asked for by name, to be added to, and nobody has said since that this is over.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.changing = False
        self._parameters = parameters

    def __getitem__(self, name: str) -> Tensor:
        self.changing = True
        return super().__getitem__(name)

    def __missing__(self, name: str) -> Tensor:
        self.complete()
        return self[name]

    def complete(self) -> None:
        """Make the sums, if they are not there yet."""
        if not self:
            for name, parameter in self._parameters.items():
                self[name] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)

    def like(self) -> Sums:
        """Return sums of the same parameters, zero."""
        return Sums(self._parameters)


class Ledger:
    """Sums that only finite samples enter.

    Args:
        like: the parameters scored, by name.
        add: adds the squares of a batch to given sums, returns the positions of samples it left out.
    """

    def __init__(self, like: Mapping[str, Tensor], add: Add) -> None:
        self.sums = Sums(like)
        self.used: list[int] = []
        self.dropped: list[int] = []
        self._add = add
        self._scratch: Sums | None = None
        self._journal: list[tuple[Batch, list[int]]] = []
        self._room = sum(4 * parameter.numel() for parameter in like.values())
        self._unread = 0  # batches added since the sums were last seen to be finite

    def add(self, batch: Batch, positions: list[int]) -> None:
        """Add a batch."""
        if self._scratch is not None:
            self._add_checked(batch, positions)
            self.sums.changing = False
            return
        self._note(positions, self._add(self.sums, batch, positions))
        self.sums.changing = False
        self._journal.append((batch, positions))
        self._room -= nbytes(batch)
        self._unread += 1
        if self._unread == _CHECK_EVERY or self._room < 0:
            self._check()

    def settle(self) -> None:
        """Check what was added since the last check; the sums are finite and complete afterwards."""
        if self._scratch is None and self._unread:
            self._check()
        self.sums.complete()

    def whole(self) -> bool:
        """Return whether the sums are finite, and have all of the batches that were added and no part of another.

        They may not be after an error. If they are, `settle` runs nothing again.
        """
        return not self.sums.changing and _finite(self.sums)

    def _check(self) -> None:
        self._unread = 0
        if not _finite(self.sums):
            journal = self._journal
            self.used, self.dropped = [], []
            _clear(self.sums)
            self._scratch = self.sums.like()
            for batch, positions in journal:
                self._add_checked(batch, positions)
            # not before the last: until then the sums have fewer batches than were added
            self.sums.changing = False
        elif self._room < 0:
            self._scratch = self.sums.like()
        if self._scratch is not None:
            self._journal = []

    def _add_checked(self, batch: Batch, positions: list[int]) -> None:
        if not self._try(batch, positions):
            for index, position in enumerate(positions):
                if not self._try(take(batch, [index]), [position]):
                    self.dropped.append(position)

    def _try(self, batch: Batch, positions: list[int]) -> bool:
        scratch = self._scratch if self._scratch is not None else self.sums.like()
        _clear(scratch)
        left_out = self._add(scratch, batch, positions)
        if not _finite(scratch):
            return False
        if scratch:
            torch._foreach_add_([self.sums[name] for name in scratch], list(scratch.values()))
        self._note(positions, left_out)
        return True

    def _note(self, positions: list[int], left_out: list[int]) -> None:
        self.dropped += left_out
        self.used += [position for position in positions if position not in left_out]


def _clear(sums: Mapping[str, Tensor]) -> None:
    for total in sums.values():
        total.zero_()


def _finite(sums: Mapping[str, Tensor]) -> bool:
    # a sum is finite only if its terms are; one transfer a device
    totals = [total.sum() for total in sums.values()]
    return all(
        bool(torch.stack([t for t in totals if t.device == d]).isfinite().all()) for d in {t.device for t in totals}
    )
