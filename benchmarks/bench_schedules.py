"""What a schedule adds to a training step: the first stage of DPS, and what else works at every step.

The plain step is that of the same optimizer without a schedule, on all weights. Stages are longer than what is timed:
the choice at a stage's end is a top-k, which bench_topk_indices.py times.
"""

import functools

import harness
import pytest
import torch
import training_steps
import workloads

import sparseft
from sparseft import schedules

PLAIN = "the same step without a schedule"
LONG = 10**6  # steps, more than are timed
SCHEDULES = {
    "DPS, stage one": lambda model, optimizer: schedules.DPS(model, optimizer, stage_steps=LONG),
    "DPS Mix, stage one": lambda model, optimizer: schedules.DPSMix(model, optimizer, stage_steps=LONG),
    "LT-SFT, phase one": lambda model, optimizer: schedules.LTSFT(model, optimizer, 0.005, LONG),
    "diff pruning, phase one": lambda model, optimizer: schedules.DiffPruning(model, optimizer, 0.005, LONG),
    "Child-Tuning-F": lambda model, optimizer: schedules.ChildTuningF(model, optimizer, 0.3),
    "Mixout": lambda model, optimizer: schedules.Mixout(model, optimizer, 0.9),
}
CASES = {"cpu": [(name, 16, 128) for name in SCHEDULES], "cuda": [(name, 64, 128) for name in SCHEDULES]}


@pytest.mark.parametrize(("device", "name", "n", "t"), harness.on_devices(CASES))
def test_step_of_schedule(compare, device, name, n, t):
    (batch,) = workloads.batches("MiniLM", device, 1, n, t)
    ours, schedule = scheduled(name, device)
    plain, _ = scheduled(None, device)
    if name.startswith("DPS,"):
        check(device, batch)
    compare(
        harness.Case("training_step", f"MiniLM, {n} x {t} tokens, {name}", dtype=torch.float32, device=device),
        functools.partial(ours, batch),
        {PLAIN: functools.partial(plain, batch)},
        rounds=9,
    )
    assert not schedule.skipped


def scheduled(name, device):
    """Return a step and its schedule, None without a name."""
    model = workloads.encoder(device).train()
    optimizer = sparseft.SparseAdamW(model.parameters(), lr=training_steps.LR)
    schedule = SCHEDULES[name](model, optimizer) if name else None
    return training_steps.step(model, optimizer), schedule


def check(device, batch):
    """Stage one trains as without it, and sums the squares of the gradients of its steps."""
    model, plain = workloads.encoder(device), workloads.encoder(device)
    optimizer, other = (sparseft.SparseAdamW(each.parameters(), lr=training_steps.LR) for each in (model, plain))
    schedule = SCHEDULES["DPS, stage one"](model, optimizer)
    sums = {name: torch.zeros_like(parameter) for name, parameter in plain.named_parameters()}
    for _ in range(2):
        training_steps.step(model, optimizer)(batch)
        plain(**batch).loss.backward()
        for name, parameter in plain.named_parameters():
            sums[name] += parameter.grad**2
        other.step()
        other.zero_grad()
    for name, scores in schedule.state_dict()["scores"].items():
        torch.testing.assert_close(scores, sums[name], rtol=1e-3, atol=1e-5 * float(sums[name].max()))
    for ours, parameter in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter)
