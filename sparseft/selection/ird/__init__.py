"""IRD: search samples and entries together, keeping those of larger Fisher information. Source: arXiv 2403.08484.

FISH draws its samples at random. IRD starts from as many and from the entries that are best for them, halves both
again and again, keeping the samples whose gradients are large at the entries kept and the entries whose gradients are
large for the samples kept, and takes the pair whose mask an evaluator likes best.

There is no published code, and the paper leaves much open: this is a reconstruction, and every unknown is one of its
`Options`. After one Fisher pass over all samples, one more gives their squared gradients at the candidate entries;
every cell of the search is then sums over rows and columns of that table, and a top-k.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.fisher.columns import ColumnPass
from sparseft.fisher.loss import Objective
from sparseft.fisher.report import FisherReport, warn_of_fallback
from sparseft.fisher.sample_dim import SampleDim
from sparseft.mask import Mask
from sparseft.selection.arguments import checked_figure
from sparseft.selection.ird.options import Evaluator, Options
from sparseft.selection.ird.passes import fisher_of
from sparseft.selection.ird.path import Cell, IRDPath
from sparseft.selection.ird.pool import Pool, read
from sparseft.selection.ird.search import Search, Space
from sparseft.selection.ird.store import Layout, Store, Stream, Table
from sparseft.selection.ird.trial import Trial
from sparseft.selection.scopes import Scope
from sparseft.selection.top_k import count_at, top_k

__all__ = ["Cell", "IRDPath", "Options", "search"]


def search(
    model: nn.Module,
    data: Iterable[Any],
    names: list[str],
    options: Options,
    *,
    density: float | None,
    k: int | None,
    scope: Scope,
    seed: int,
    progress: bool,
    info: Mapping[str, Any],
    **mask_options: Any,
) -> IRDPath:
    """Search, and return the path with a mask for every cell.

    Args:
        model: left as it was found.
        data: batches of training samples, shuffled.
        names: the parameters to select from.
        options: how to search.
        density: of the start; or give k.
        k: number of entries of the start.
        scope: "tensor" ranks and halves the entries of each parameter by themselves.
        seed: of the draws of mode "sampled".
        progress: show bars.
        info: what masks record, beside the path.
        mask_options: passed on to Mask.
    """
    objective, turned = options.objective(seed)
    tried = options.select_by == "evaluator" and options.evaluator is None
    pool, held_out = read(data, options.samples, options.held_out if tried else 0.0, turned)
    everyone = _Everyone(model, names, objective, progress)
    norms: dict[int, float] | None = {} if options.sample_score == "all" else None
    scores, used, report = everyone.fisher(pool, norms)
    _check_used(used, pool, options.max_dropped)
    warn_of_fallback(report, len(scores), stacklevel=4)
    start = top_k(scores, density, k=k, scope=scope)
    dropped = sorted(set(pool.positions) - set(used))
    pool = pool.only(used)
    layout = Layout({name: score.numel() for name, score in scores.items()})
    del scores
    entries = layout.join(start)
    store, note = _store(everyone, pool, entries, layout, options)

    def mask_of(these: Tensor, **found: Any) -> Mask:
        return Mask(layout.split(these), start.shapes, info={**info, **found}, **mask_options)

    evaluator = options.evaluator
    if tried:
        evaluator = _trial(model, pool, held_out, options, seed, turned)
    space = _space(everyone, pool, store, layout, entries, options, scope)
    space.fixed = norms
    if evaluator is not None:
        space.judge = lambda these: _judged(evaluator, mask_of(these))
    found = Search(space, options)
    found.run(used, entries)
    path = IRDPath(tuple(found.cells), (note,))
    more = {
        "samples": path.cells[path.chosen].samples,
        "dropped": dropped,
        "fallback": report.fallback,
        "capped": found.capped,
        "held_out": held_out.positions,
        "path": path.plain(),
    }
    return replace(path, masks=tuple(mask_of(these, **more) for these in found.entries))


class _Everyone:
    """All selectable entries of a model."""

    def __init__(self, model: nn.Module, names: list[str], objective: Objective, progress: bool) -> None:
        self.model, self.names, self.objective, self.progress = model, names, objective, progress
        self._last: tuple[list[int], dict[str, Tensor]] = ([], {})

    def fisher(
        self, pool: Pool, norms: dict[int, float] | None = None
    ) -> tuple[dict[str, Tensor], list[int], FisherReport]:
        return fisher_of(self.model, pool, self.names, self.objective, progress=self.progress, norms=norms)

    def largest(self, pool: Pool, counts: list[int], scope: Scope) -> Mapping[str, Tensor]:
        """Return the entries that are best for some samples."""
        if self._last[0] != pool.positions:
            # in a grid the same samples choose several times
            self._last = pool.positions, self.fisher(pool)[0]
        scores = self._last[1]
        if scope == "global":
            return top_k(scores, k=counts[0])
        kept = zip(scores.items(), counts, strict=True)
        return {name: torch.ops.sparseft.topk_indices([score], count)[0] for (name, score), count in kept}


def _store(everyone: _Everyone, pool: Pool, entries: Tensor, layout: Layout, options: Options) -> tuple[Store, str]:
    """Return what measures, and how it does so in words."""
    model, objective, progress = everyone.model, everyone.objective, everyone.progress
    samples = len(pool.positions)
    size = samples * len(entries) * 4
    if options.restrict == "nested" and size <= options.memory_limit:
        columns = ColumnPass(model, layout.split(entries), objective, squared=True)
        return (
            Table(pool, entries, columns, progress=progress),
            f"one table of {samples:,} samples x {len(entries):,} entries, {size / 2**20:,.1f} MiB",
        )
    stream = Stream(model, pool, layout, objective, progress=progress)
    if options.restrict == "global":
        return stream, "entries chosen among all: the samples kept were run again, up to twice, at every halving"
    note = (
        f"{samples:,} samples x {len(entries):,} entries x 4 bytes are {size / 2**20:,.1f} MiB, above the "
        f"memory_limit of {options.memory_limit / 2**20:,.1f}: the samples kept were run again at every halving of "
        "the samples"
    )
    if options.rescore and options.sample_score == "selected" and options.order != "grid":
        note += ", and once more where the entries kept rank them"
    warnings.warn(note, stacklevel=4)
    return stream, note


def _space(
    everyone: _Everyone,
    pool: Pool,
    store: Store,
    layout: Layout,
    entries: Tensor,
    options: Options,
    scope: Scope,
) -> Space:
    """Return what the search moves in, all but the evaluator."""

    def together(these: Tensor) -> list[int]:
        return [len(these)]

    groups, sizes = (together, [sum(layout.sizes)]) if scope == "global" else (layout.counts, layout.sizes)
    space = Space(store, sum(layout.sizes), groups, _least(groups(entries), sizes, options.min_density))
    if options.restrict == "global":
        space.everywhere = lambda samples, counts: layout.join(everyone.largest(pool.only(samples), counts, scope))
    space.classes = pool.labels() if options.class_balance else None
    space.lengths = pool.lengths() if options.length_normalisation else None
    return space


def _least(counts: list[int], sizes: list[int], least: float | None) -> list[int]:
    """Return in how many entries of each group halving ends."""
    if least is None:
        return [math.ceil(count / 8) for count in counts]
    ends = [count_at(least, size) if 0 < least <= 1 else 0 for size in sizes]
    if not 0 < sum(ends) <= sum(counts):
        raise ValueError(
            f"min_density must lie in (0, density], density at {sum(counts) / sum(sizes):.3g}, got {least}"
        )
    return [min(pair) for pair in zip(counts, ends, strict=True)]


def _trial(model: nn.Module, pool: Pool, held_out: Pool, options: Options, seed: int, turned: SampleDim) -> Evaluator:
    """Return the default evaluator: its loss is of given labels, whatever the Fisher's mode."""
    by_token = options.loss is not None and options.token_reduction == "token"
    objective = Objective(
        "empirical",
        options.loss,
        "token" if by_token else "mean",
        seed,
        label_smoothing=options.label_smoothing,
        samples=turned,
    )
    return Trial(model, pool, held_out, objective, options.trial_steps, options.trial_lr)


def _judged(evaluator: Evaluator, mask: Mask) -> float:
    return checked_figure("evaluator", evaluator(mask), mask)


def _check_used(used: list[int], pool: Pool, most: float) -> None:
    lost = len(pool.positions) - len(used)
    if not used or lost > most * len(pool.positions):
        raise ValueError(
            f"at most {most:.1%} of the samples may lack a finite loss and gradient, got {lost} of "
            f"{len(pool.positions)}; check the labels, the model's weights and its dtype, or raise max_dropped"
        )
