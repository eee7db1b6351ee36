"""What one use of a parameter contributes to its per-sample gradient, and how contributions become Fisher.

A few forms cover every rule; that of convolutions is in `patches`, that of experts in `grouped`. They are kept
unmultiplied, because the contributions of all uses of a parameter must be added per sample before they are squared,
and because the per-sample gradient itself is never stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseft import ops  # noqa: F401  (registers torch.ops.sparseft)
from sparseft.fisher.grouped import Grouped
from sparseft.fisher.patches import Patches


@dataclass
class Outer:
    """A linear use: the gradient of sample n is `sum_t left[n, t, :] outer right[n, t, :]`.

    left: [N, T, A], right: [N, T, B] for a parameter [A, B]; (dy, x) for a Linear [O, I], (x, dy) for a Conv1D [I, O].
    """

    left: Tensor
    right: Tensor

    def reaches(self) -> Tensor:
        """Return which samples get a nonzero gradient: bool [N]."""
        return _nonzero(self.left) & _nonzero(self.right)

    def at(self, indices: Tensor) -> Tensor:
        """Return the per-sample gradients at chosen entries, flat positions in [A, B]: fp32 [N, k]."""
        left, right = _without_doubles(self.left, self.right)
        found: Tensor = torch.ops.sparseft.outer_at(left, right, indices)
        return found


@dataclass
class Lookup:
    """An embedding use: row v of the gradient of sample n is the sum of dy[n, l, :] over ids[n, l] == v.

    ids: int [N, L], dy: [N, L, H], zero where the id is the padding index.
    """

    ids: Tensor
    dy: Tensor

    def reaches(self) -> Tensor:
        """Return which samples get a nonzero gradient: bool [N]."""
        return _nonzero(self.dy)

    def at(self, indices: Tensor) -> Tensor:
        """Return the per-sample gradients at chosen entries, flat positions in [V, H]: fp32 [N, k]."""
        (samples, length), width = self.ids.shape, self.dy.shape[2]
        found = torch.zeros(samples, len(indices), device=self.dy.device)
        tokens, counts = torch.unique_consecutive(indices.long() // width, return_counts=True)
        if not len(tokens) or not length:
            return found
        # of every lookup, which of the chosen tokens it is of, if any
        ids = self.ids.flatten().long()
        slot = torch.searchsorted(tokens, ids).clamp_(max=len(tokens) - 1)
        hit = (tokens[slot] == ids).nonzero()[:, 0]
        if not len(hit):
            return found
        # a token that a sample repeats: summed, so that each (sample, token) is there once
        keys, order = (slot[hit] * samples + hit // length).sort(stable=True)
        run, start = _runs(keys)
        rows = _sum_runs(self.dy.flatten(0, 1)[hit[order]].float(), run)
        last = int(run[-1]) + 1
        slot, sample = keys[start[:last]] // samples, keys[start[:last]] % samples
        # each row has as many chosen entries as its token: they follow each other in `indices`
        row = torch.arange(last, device=ids.device).repeat_interleave(counts[slot])
        first = counts.cumsum(0) - counts
        entry = torch.arange(len(row), device=ids.device) - (counts[slot].cumsum(0) - counts[slot])[row]
        entry += first[slot[row]]
        found[sample[row], entry] = rows[row, indices.long()[entry] % width]
        return found


@dataclass
class Vector:
    """Any use of a small parameter: its per-sample gradients themselves, fp32 [N, numel]."""

    grad: Tensor

    def reaches(self) -> Tensor:
        """Return which samples get a nonzero gradient: bool [N]."""
        return _nonzero(self.grad)

    def at(self, indices: Tensor) -> Tensor:
        """Return the per-sample gradients at chosen entries: fp32 [N, k]."""
        return self.grad[:, indices.long()].float()


Contribution = Outer | Patches | Grouped | Lookup | Vector


def joined_outers(outers: list[Outer]) -> tuple[Tensor, Tensor]:
    """Return the linear uses of one parameter [A, B] as one: uses follow each other along T."""
    return _without_doubles(*(_joined([getattr(outer, side) for outer in outers]) for side in ("left", "right")))


def outer_rows(outers: list[Outer], ids: Tensor) -> Tensor:
    """Return the rows of the linear uses' per-sample gradients named by ids [N, L]: fp32 [N, L, B]."""
    parts = []
    for outer in outers:
        columns = outer.left.gather(2, ids.unsqueeze(1).expand(-1, outer.left.shape[1], -1))  # [N, T, L]
        parts.append(torch.bmm(columns.transpose(1, 2).float(), outer.right.float()))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def add_lookups_(
    fisher: Tensor, lookups: list[Lookup], rows: Tensor | None = None, scores: Tensor | None = None
) -> None:
    """Add the squared per-sample gradients of embedding uses to fisher [V, H].

    rows: for a parameter that is also used linearly, the linear gradient a at the looked-up rows, [N, L, H]. With b
    the lookups' gradient, (a + b)^2 = a^2 + (2a + b) b: a^2 is there already, and b is zero outside these rows.
    Repeated ids of a sample are summed, then squared. Sizes depend on shapes only, so that nothing waits for a GPU.
    scores: fp32 [N], to which what is added of each sample is added too, summed over all entries.
    """
    ids = torch.cat([lookup.ids for lookup in lookups], 1)
    grads = torch.cat([lookup.dy for lookup in lookups], 1).flatten(0, 1).float()
    samples = ids.shape[0]
    sample = torch.arange(samples, device=ids.device).unsqueeze(1)
    keys, order = (ids.long() * samples + sample).flatten().sort(stable=True)
    run, start = _runs(keys)
    grads = _sum_runs(grads, torch.empty_like(run).scatter_(0, order, run))
    terms = grads.square_() if rows is None else (2 * rows.flatten(0, 1)[order[start]] + grads) * grads
    if scores is not None:
        scores += _sum_runs(terms.sum(1, keepdim=True), keys[start] % samples)[:samples, 0]
    # the same row in several samples
    token = keys[start] // samples
    if fisher.device.type != "cpu":
        # summed before it is added: the order of what is added to one row is defined on the CPU alone
        run, start = _runs(token)
        token, terms = token[start], _sum_runs(terms, run)
    fisher.index_add_(0, token, terms)


def add_vectors_(fisher: Tensor, grad: Tensor, scores: Tensor | None = None) -> None:
    """Add squared per-sample gradients [N, numel] to fisher, and their sums by sample to scores, fp32 [N]."""
    squares = grad.square()
    fisher += squares.sum(0).view(fisher.shape)
    if scores is not None:
        scores += squares.sum(1)


def _without_doubles(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return (left.float(), right.float()) if left.dtype == torch.float64 else (left, right)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _runs(keys: Tensor) -> tuple[Tensor, Tensor]:
    # run [M]: which run of equal keys an entry is in; start [M]: where each run starts. Runs that do not exist point
    # at the last entry, and their sums are zero.
    changes = torch.ones_like(keys)
    changes[1:] = keys[1:] != keys[:-1]
    run = changes.cumsum(0) - 1
    start = torch.searchsorted(run, torch.arange(len(keys), device=keys.device)).clamp_(max=len(keys) - 1)
    return run, start


def _sum_runs(values: Tensor, run: Tensor) -> Tensor:
    # the backward of an embedding is a sum of rows by index: parallel on a CPU, without atomics on a GPU
    sums: Tensor = torch.ops.aten.embedding_dense_backward(values, run, len(run), -1, False)
    return sums


def _nonzero(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return torch.zeros(len(tensor), dtype=torch.bool, device=tensor.device)
    # 0 * inf leaves NaN in rows that no gradient reaches. The largest is found with vector instructions, `any` is not
    return tensor.flatten(1).nan_to_num(0).abs().amax(1).gt(0)
