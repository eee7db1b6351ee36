"""One of two processes that train with schedules under DDP; run by test_schedules_distributed.py.

python ddp_schedules_worker.py RANK STORE RESULT: a file to meet at, and one to write masks and weights to.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparseft
from sparseft.schedules import DPS, ChildTuningF, DiffPruning, DPSMix

STEPS, BAD = 7, 2  # BAD: the step at which one process has no finite loss
MAKE = {
    "DPS": lambda model, optimizer: DPS(model, optimizer, 0.3, stage_steps=(3, 2)),
    "DPSMix": lambda model, optimizer: DPSMix(model, optimizer, 0.7, stage_steps=(3, 2)),
    "ChildTuningF": lambda model, optimizer: ChildTuningF(model, optimizer, 0.4),
    "DiffPruning": lambda model, optimizer: DiffPruning(
        model, optimizer, 0.2, 4, penalty=1e-4, log_alpha=0.5, structured=True, dense="3.*"
    ),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 4))


def train(name, wrap, own, spoils):
    """Train with a schedule, two micro-batches a step. wrap(model): what runs it; own: which samples of each batch."""
    model = net()
    optimizer = sparseft.SparseAdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = MAKE[name](model, optimizer)
    run, masks = wrap(model), []
    for step in range(STEPS):
        for part in range(2):
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(2 * step + part))[own]
            loss = nn.functional.cross_entropy(run(x), x[:, :4].argmax(1))
            (loss * (float("nan") if spoils and step == BAD else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.append({key: schedule.mask[key] for key in schedule.mask})
    return {"masks": masks, "weights": model.state_dict(), "counts": (schedule.steps, schedule.skipped)}


def main(rank, store, result):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    own = slice(4 * rank, 4 * rank + 4)
    torch.save({name: train(name, DistributedDataParallel, own, rank == 1) for name in MAKE}, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    # DDP keeps gloo's threads past destroy_process_group, and one that frees a tensor while the interpreter shuts
    # down aborts the process: leave without shutting it down.
    os._exit(0)
