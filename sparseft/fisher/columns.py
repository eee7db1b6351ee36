"""Per-sample gradients at chosen entries: k columns of the matrix that has a row a sample and a column a weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparseft.fisher.batches import Batch, limited
from sparseft.fisher.capture import Use
from sparseft.fisher.contribution import Contribution
from sparseft.fisher.loss import Loss, Mode, Objective, Reduction
from sparseft.fisher.one_pass import OnePass
from sparseft.fisher.parameters import other_names, scored_parameters, unwrapped
from sparseft.fisher.recomputation import recomputation
from sparseft.fisher.report import FisherReport, warn_of_fallback
from sparseft.fisher.sample_dim import SampleDim
from sparseft.fisher.state import evaluation
from sparseft.mask import check_indices


class SampleGradients(Mapping[str, Tensor]):
    """Parameter name -> fp32 [N, k], the gradients of each sample's loss at chosen entries of the parameter.

    Attributes:
        columns: all of them side by side, fp32 [N, K], in the order of the names, which is the model's.
        report: how they were made; `report.positions` says where the N samples stand in the data, row after row.
    """

    def __init__(self, columns: Tensor, where: Mapping[str, slice], report: FisherReport) -> None:
        self.columns, self.report = columns, report
        self._where = dict(where)

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[:, self._where[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def sample_gradients(
    model: nn.Module,
    data: Iterable[Batch],
    indices: Mapping[str, Tensor],
    *,
    samples: int | None = None,
    squared: bool = False,
    mode: Mode = "empirical",
    loss: Loss | None = None,
    token_reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    batch_dim: int | Mapping[str, int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SampleGradients:
    """Return d loss_n / d theta_j for every sample n and every chosen entry j, in one backward pass a batch.

    They are the gradients whose squares `estimate_fisher` averages. Neither a dense weight gradient nor a per-sample
    gradient of a matrix is formed; memory is that of a forward and backward pass, and twice N * K * 4 bytes.

    Args:
        model: as for `estimate_fisher`; left as it was found.
        data: batches, as for `estimate_fisher`.
        indices: parameter name -> chosen entries, flat positions in C order, sorted, unique: a Mask, for instance.
        samples: how many samples to use, from the start of the data; None means all.
        squared: return the terms of the Fisher instead: the squares, summed over what the mode or the reduction sums
            over. Needed with mode "expected" and token_reduction "token", where a sample has several gradients.
        mode: as for `estimate_fisher`, and so are the next four.
        loss: of the caller's own.
        token_reduction: of a token-level loss.
        label_smoothing: of a cross-entropy.
        batch_dim: the dimension that counts samples.
        seed: of the draws of mode "sampled".
        progress: show a bar, if the pass takes longer than two seconds.

    Returns:
        One row a sample. Samples are dropped whose loss, or gradient at a chosen entry, is not finite; see the report.

    Raises:
        TypeError: an index list is not of integers.
        ValueError: index lists that do not fit the model; several gradients a sample; what `estimate_fisher` refuses.
    """
    if not squared and (mode == "expected" or token_reduction == "token"):
        raise ValueError(
            f'mode "expected" and token_reduction "token" have several gradients a sample, got {mode!r} and '
            f"{token_reduction!r}; ask for the sum of their squares with squared=True"
        )
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, or None for all, got {samples}")
    turned = SampleDim(batch_dim)
    objective = Objective(mode, loss, token_reduction, seed, label_smoothing=label_smoothing, samples=turned)
    columns = ColumnPass(model, indices, objective, squared=squared)
    blocks: list[Tensor] = []
    columns.run(limited(data, samples, turned.first), lambda positions, block: blocks.append(block), progress=progress)
    warn_of_fallback(columns.report, len(columns.report.rules), stacklevel=3)
    return SampleGradients(torch.cat(blocks), columns.where, columns.report)


class ColumnPass:
    """Runs batches, and hands out their per-sample gradients at chosen entries.

    Args:
        model: as for `sample_gradients`.
        indices: as for `sample_gradients`; at least one entry.
        objective: what is differentiated.
        squared: as for `sample_gradients`.
    """

    def __init__(
        self, model: nn.Module, indices: Mapping[str, Tensor], objective: Objective, *, squared: bool
    ) -> None:
        self._model, self._objective = unwrapped(model), objective
        self._parameters = _chosen(self._model, indices)
        self.report = FisherReport(
            str(objective.settings["mode"]),
            aliases=other_names(self._model, self._parameters),
            settings=dict(objective.settings),
        )
        self._run = OnePass(self._model, objective, self._parameters, self.report)
        device = next(self._model.parameters()).device
        self._sink = _Columns(
            {name: indices[name].to(p.device) for name, p in self._parameters.items()}, device, squared
        )
        self.where = self._sink.where

    def run(
        self,
        batches: Iterable[tuple[Batch, list[int]]],
        receive: Callable[[list[int], Tensor], None],
        *,
        progress: bool,
    ) -> None:
        """Call receive(positions, columns fp32 [n, K]) for each of the batches, of its finite samples.

        Raises:
            ValueError: no sample is finite.
        """
        used: list[int] = []
        dropped: list[int] = []
        bar = tqdm(desc="Per-sample gradients", unit="sample", delay=2, disable=not progress)
        with evaluation(self._model, self._parameters), recomputation(self._model), bar:
            for batch, positions in batches:
                self._sink.start(positions)
                self._sink.drop(self._run.add(self._sink, batch, positions))
                kept, block = self._sink.result()
                used += kept
                dropped += [position for position in positions if position not in kept]
                if kept:
                    receive(kept, block)
                bar.update(len(positions))
        self.report.positions, self.report.dropped = used, dropped
        self.report.loss = self._objective.description
        self.report.rules = {name: self._run.rule(name) for name in self._parameters}
        if not used:
            raise ValueError(
                f"at least one sample must have a finite loss and gradient, got none in {len(dropped)}; check the "
                "model's weights, its dtype and the labels"
            )


class _Columns:
    """A sink for the samples of one batch at a time."""

    def __init__(self, indices: Mapping[str, Tensor], device: torch.device, squared: bool) -> None:
        self._indices, self._device, self._squared = indices, device, squared
        self.where: dict[str, slice] = {}
        self.width = 0  # K
        for name, index in indices.items():
            self.where[name] = slice(self.width, self.width + index.numel())
            self.width += index.numel()
        self._rows: dict[int, int] = {}
        self._left_out: list[int] = []

    def start(self, positions: list[int]) -> None:
        """Begin a batch."""
        self._rows = {position: row for row, position in enumerate(positions)}
        self._total = torch.zeros(len(positions), self.width, device=self._device)

    def drop(self, positions: list[int]) -> None:
        """Leave samples out."""
        self._left_out = positions

    def result(self) -> tuple[list[int], Tensor]:
        """Return the positions of the samples that are finite, and their rows."""
        finite = self._total.isfinite().all(1)
        finite[[self._rows[position] for position in self._left_out]] = False
        if bool(finite.all()):
            return list(self._rows), self._total
        positions = [position for position, kept in zip(self._rows, finite.tolist(), strict=True) if kept]
        return positions, self._total[finite]

    def receiver(self, uses: list[Use], ignored: Collection[str], positions: list[int]) -> _Receiver:
        """Return what adds up the contributions of some of the batch's samples."""
        rows = torch.tensor([self._rows[position] for position in positions], device=self._device)
        return _Receiver(self, rows, ignored)

    def add(self, rows: Tensor, grads: Tensor) -> None:
        """Add whole gradients, or their squares."""
        self._total[rows] += grads.square() if self._squared else grads

    def add_whole(self, positions: list[int], grads: Mapping[str, Tensor]) -> None:
        """Add gradients of some samples."""
        rows = torch.tensor([self._rows[position] for position in positions], device=self._device)
        for name, each in grads.items():
            chosen = each.reshape(len(each), -1)[:, self._indices[name].long()].to(self._device)
            self._total[rows, self.where[name]] += chosen.square() if self._squared else chosen

    def columns_of(self, use: Use, part: Contribution) -> Tensor:
        """Return what a use contributes, fp32 [n, k]."""
        indices = self._indices[use.name]
        if use.rows is None:
            return part.at(indices).to(self._device)
        start, stop = use.rows.start * use.rows.width, use.rows.stop * use.rows.width
        own = (indices >= start) & (indices < stop)
        values = part.at(indices[own] - start).to(self._device)
        found = values.new_zeros(len(values), len(indices))
        found[:, own.to(self._device)] = values
        return found


class _Receiver:
    """Adds the contributions of all uses before they are squared."""

    def __init__(self, columns: _Columns, rows: Tensor, ignored: Collection[str]) -> None:
        self._columns, self._rows, self._ignored = columns, rows, ignored
        self._clear()

    def __call__(self, use: Use, part: Contribution) -> None:
        if use.name not in self._ignored:
            self._grads[:, self._columns.where[use.name]] += self._columns.columns_of(use, part)

    def finish(self) -> None:
        self._columns.add(self._rows, self._grads)
        self._clear()

    def _clear(self) -> None:
        self._grads = torch.zeros(len(self._rows), self._columns.width, device=self._rows.device)


def _chosen(model: nn.Module, indices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters that index lists are of, those of empty lists left out."""
    wanted = [name for name, index in indices.items() if index.numel()]
    if not wanted:
        raise ValueError("indices must choose at least one entry, got none")
    parameters = scored_parameters(model, wanted)
    later = [name for name in wanted if name not in parameters]
    if later:
        raise ValueError(f"tied parameters go by their first name, got {later[:5]}; see model.named_parameters()")
    for name, parameter in parameters.items():
        check_indices(name, indices[name], parameter.numel())
    return parameters
