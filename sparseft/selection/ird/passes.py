"""Passes over a pool: the Fisher of all selectable entries, and the squared norms of whole per-sample gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparseft.fisher.batches import take
from sparseft.fisher.ledger import Ledger
from sparseft.fisher.loss import Objective
from sparseft.fisher.one_pass import OnePass
from sparseft.fisher.parameters import scored_parameters, unwrapped
from sparseft.fisher.report import FisherReport
from sparseft.fisher.state import evaluation, without_recomputation
from sparseft.fisher.tally import Squares
from sparseft.selection.ird.pool import Pool


def fisher_of(
    model: nn.Module, pool: Pool, names: list[str], objective: Objective, *, progress: bool
) -> tuple[dict[str, Tensor], list[int]]:
    """Return the sum of the samples' squared gradients, name -> fp32, and the positions that are in it.

    What `estimate_fisher` does, for samples that keep their positions in the data: drawn labels depend on them.
    """
    model = unwrapped(model)
    parameters = scored_parameters(model, names)
    run = OnePass(model, objective, parameters, FisherReport(str(objective.settings["mode"])))
    ledger = Ledger(parameters, lambda sums, batch, positions: run.add(Squares(sums), batch, positions))
    bar = tqdm(total=len(pool.positions), desc="Fisher", unit=" samples", delay=2, disable=not progress)
    with evaluation(model, parameters), without_recomputation(), bar:
        for batch, positions in pool:
            ledger.add(batch, positions)
            bar.update(len(positions))
        ledger.settle()
    for total in ledger.sums.values():
        # a tied weight's cross terms may leave -0.0000001 where 0 is meant
        total.clamp_(min=0)
    return ledger.sums, sorted(ledger.used)


def squared_norms(model: nn.Module, pool: Pool, names: list[str], objective: Objective) -> dict[int, float]:
    """Return position -> sum of the squares of the sample's gradient over all named parameters.

    Each sample is run by itself: exact for every rule, and as slow as batches of one are.
    """
    model = unwrapped(model)
    parameters = scored_parameters(model, names)
    run = OnePass(model, objective, parameters, FisherReport(str(objective.settings["mode"])))
    sums = {name: torch.zeros(p.shape, device=p.device) for name, p in parameters.items()}
    norms = {}
    with evaluation(model, parameters), without_recomputation():
        for batch, positions in pool:
            for row, position in enumerate(positions):
                for total in sums.values():
                    total.zero_()
                run.add(Squares(sums), take(batch, [row]), [position])
                norms[position] = sum(float(total.sum(dtype=torch.float64)) for total in sums.values())
    return norms
