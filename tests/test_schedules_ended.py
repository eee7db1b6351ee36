"""A run that ends before its schedule has chosen says so."""

import warnings

import pytest
import torch
from torch import nn

import sparseft
from sparseft.schedules import DPS, LTSFT, ChildTuningF, DiffPruning, DPSMix, DropGrow, Mixout, Refresh


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 4))


def run(model, optimizer, steps):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 12, generator=generator), torch.randint(0, 4, (8,), generator=generator)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def choose(model):
    return sparseft.select("random", model, density=0.3, seed=1)


# what is made, how, and the option that its choice depends on: each chooses at step 5
CHOOSING = [
    (DPS, {"density": 0.5, "stage_steps": 5}, "stage_steps= or total_steps="),
    (DPSMix, {"density": 0.5, "total_steps": 20, "update_ratio": 0.25}, "stage_steps= or total_steps="),
    (LTSFT, {"density": 0.2, "steps": 5}, "steps="),
    (DiffPruning, {"density": 0.2, "steps": 5}, "steps="),
    (DropGrow, {"every": 5}, "every="),
    (Refresh, {"every": 5, "choose": choose}, "every="),
]
REST = [(Mixout, {"p": 0.5}), (ChildTuningF, {"p": 0.5})]


def make(schedule, options):
    model = net()
    if schedule in (DropGrow, Refresh):
        mask = sparseft.select("random", model, density=0.2)
        optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=1e-2)
        return model, optimizer, schedule(model, optimizer, mask, **options)
    optimizer = sparseft.SparseAdamW(model.parameters(), lr=1e-2)
    return model, optimizer, schedule(model, optimizer, **options)


def close(model, optimizer, schedule, steps):
    run(model, optimizer, steps)
    schedule.close()


def leave(model, optimizer, schedule, steps):
    with schedule:
        run(model, optimizer, steps)


def fail(model, optimizer, schedule, steps):
    with schedule:
        run(model, optimizer, steps)
        raise KeyboardInterrupt


@pytest.mark.parametrize("end", [close, leave])
@pytest.mark.parametrize(("schedule", "options", "_"), CHOOSING)
def test_a_schedule_ends_where_warnings_are_errors_too(schedule, options, _, end):
    model, optimizer, its = make(schedule, options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="ended after"):
            end(model, optimizer, its, 4)
    assert not any("forward" in module.__dict__ for module in model.modules())
    ChildTuningF(model, optimizer, 0.5, its.mask).close()


@pytest.mark.parametrize("end", [close, leave])
@pytest.mark.parametrize(("schedule", "options", "option"), CHOOSING)
def test_a_run_that_ends_too_early_says_so_where_it_ends(schedule, options, option, end):
    model, optimizer, its = make(schedule, options)
    n, k = its.mask.n, its.mask.k
    with pytest.warns(UserWarning, match="ended after") as found:
        end(model, optimizer, its, 4)
    (message,) = found
    assert message.filename == __file__
    assert str(message.message) == (
        f"{schedule.__name__} ended after 4 steps, before its choice at step 5: {k:,} of {n:,} entries train, and a "
        f"delta would hold these; train for longer, or have it choose after fewer steps ({option})"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        its.close()


@pytest.mark.parametrize("steps", [0, 5, 7])
@pytest.mark.parametrize(("schedule", "options"), [(schedule, options) for schedule, options, _ in CHOOSING] + REST)
def test_a_run_that_came_to_its_choice_or_took_no_step_says_nothing(schedule, options, steps):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        leave(*make(schedule, options), steps)
    assert [str(each.message) for each in found] == []


@pytest.mark.parametrize(("schedule", "options", "option"), CHOOSING)
def test_of_a_run_that_fails_nothing_else_is_said(schedule, options, option):
    model, optimizer, its = make(schedule, options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyboardInterrupt):
            fail(model, optimizer, its, 2)
    # and nobody watches any more
    run(model, optimizer, 1)
    assert its.steps == 2


@pytest.mark.parametrize("steps", [9, 10, 11, 12])
def test_each_round_of_lt_sft_comes_to_a_choice(steps):
    model, optimizer, its = make(LTSFT, {"density": 0.2, "steps": 5, "rounds": 2, "sparse_steps": 3})
    with pytest.warns(match=rf"ended after {steps} steps, before its choice at step 13: 514 of 514 entries train"):
        close(model, optimizer, its, steps)


@pytest.mark.parametrize("schedule", [DPSMix, Mixout, ChildTuningF, DiffPruning])
def test_a_seed_that_is_no_whole_number_is_refused_before_the_first_step(schedule):
    model = net()
    optimizer = sparseft.SparseAdamW(model.parameters())
    options = {Mixout: {"p": 0.5}, ChildTuningF: {"p": 0.5}, DiffPruning: {"density": 0.2, "steps": 5}}
    with pytest.raises(TypeError, match=r"seed must be a whole number, got 1\.5"):
        schedule(model, optimizer, **options.get(schedule, {"density": 0.5, "stage_steps": 5}), seed=1.5)
    ChildTuningF(model, optimizer, 0.5).close()
