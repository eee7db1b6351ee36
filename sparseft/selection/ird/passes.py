"""A pass over a pool: the Fisher of all selectable entries, and the squared norms of whole per-sample gradients."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from tqdm.auto import tqdm

from sparseft.fisher.batches import Batch
from sparseft.fisher.ledger import Ledger
from sparseft.fisher.loss import Objective
from sparseft.fisher.one_pass import OnePass
from sparseft.fisher.parameters import scored_parameters, unwrapped
from sparseft.fisher.recomputation import recomputation
from sparseft.fisher.report import FisherReport
from sparseft.fisher.state import evaluation
from sparseft.fisher.tally import Squares
from sparseft.selection.ird.pool import Pool


def fisher_of(
    model: nn.Module,
    pool: Pool,
    names: list[str],
    objective: Objective,
    *,
    progress: bool,
    norms: dict[int, float] | None = None,
) -> tuple[dict[str, Tensor], list[int], FisherReport]:
    """Return the sum of the samples' squared gradients, name -> fp32, the positions that are in it, and how.

    What `estimate_fisher` does, for samples that keep their positions in the data: drawn labels depend on them.

    norms: if given, gets the squares of each of these samples, summed over all parameters, by position.
    """
    model = unwrapped(model)
    parameters = scored_parameters(model, names)
    report = FisherReport(str(objective.settings["mode"]))
    run = OnePass(model, objective, parameters, report)
    found: dict[int, float] = {}

    def add(sums: Mapping[str, Tensor], batch: Batch, positions: list[int]) -> list[int]:
        own = None if norms is None else dict.fromkeys(positions, 0.0)
        left_out = run.add(Squares(sums, own), batch, positions)
        # in place of what an earlier run of these samples found: the ledger repeats batches with bad samples
        found.update(own or {})
        return left_out

    ledger = Ledger(parameters, add)
    bar = tqdm(total=len(pool.positions), desc="Fisher", unit=" samples", delay=2, disable=not progress)
    with evaluation(model, parameters), recomputation(model), bar:
        for batch, positions in pool:
            ledger.add(batch, positions)
            bar.update(len(positions))
        ledger.settle()
    for total in ledger.sums.values():
        # a tied weight's cross terms may leave -0.0000001 where 0 is meant
        total.clamp_(min=0)
    used = sorted(ledger.used)
    if norms is not None:
        norms.update((position, max(found[position], 0.0)) for position in used)
    return ledger.sums, used, report
