"""Deltas of schedules that give one: they rebuild the model from its base, and from no other."""

import pytest
import torch
from resuming import parts_through_file
from torch import nn

import sparseft
from sparseft.schedules import DPS, LTSFT, DiffPruning, DPSMix, DropGrow, Refresh

MADE = [
    (LTSFT, {"density": 0.2, "steps": 2}),
    (LTSFT, {"density": 0.2, "steps": 2, "rounds": 2, "sparse_steps": 2}),
    (DiffPruning, {"density": 0.2, "steps": 2}),
    (DropGrow, {"every": 2}),
]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 4))


def run(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 12, generator=generator), torch.randint(0, 4, (8,), generator=generator)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def make(model, schedule, options):
    if schedule is DropGrow:
        mask = sparseft.select("random", model, density=0.2, dense="2.bias")
        optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=1e-2)
        return optimizer, schedule(model, optimizer, mask, **options)
    optimizer = sparseft.SparseAdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    return optimizer, schedule(model, optimizer, dense="2.bias", **options)


def assert_of_base_alone(model, schedule, path):
    base, other = net(), net(1)
    sparseft.save_delta(model, schedule.mask, path)
    sparseft.load_delta(base, path)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, base.get_parameter(name)), name
    before = {name: weight.clone() for name, weight in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"0\.weight"):
        sparseft.load_delta(other, path)
    assert all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())


@pytest.mark.parametrize(("schedule", "options"), MADE)
def test_a_delta_is_of_the_base_that_the_schedule_began_with(schedule, options, tmp_path):
    model = net()
    optimizer, its = make(model, schedule, options)
    run(model, optimizer, range(8))
    assert_of_base_alone(model, its, tmp_path / "delta")


@pytest.mark.parametrize("until", [1, 3, 5])
@pytest.mark.parametrize(("schedule", "options"), MADE[:3])
def test_so_it_is_of_a_run_whose_schedule_was_made_with_weights_that_had_moved(schedule, options, until, tmp_path):
    model = net()
    optimizer, its = make(model, schedule, options)
    run(model, optimizer, range(until))
    states = parts_through_file(model, its, optimizer)
    resumed = net(2)
    resumed.load_state_dict(states[0])
    optimizer, its = make(resumed, schedule, options)
    its.load_state_dict(states[1])
    optimizer.load_state_dict(states[2])
    run(resumed, optimizer, range(until, 8))
    assert_of_base_alone(resumed, its, tmp_path / "delta")


@pytest.mark.parametrize("schedule", [DPS, DPSMix])
def test_the_mask_of_a_stage_makes_no_delta(schedule, tmp_path):
    """Stage one trained what it does not hold."""
    model = net()
    optimizer = sparseft.SparseAdamW(model.parameters(), lr=1e-2)
    its = schedule(model, optimizer, 0.5, stage_steps=2)
    run(model, optimizer, range(3))
    with pytest.raises(ValueError, match="save the model whole"):
        sparseft.save_delta(model, its.mask, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_a_mask_chosen_later_makes_a_delta_with_those_before_alone(tmp_path):
    model = net()
    first = sparseft.select("random", model, density=0.2)
    optimizer = sparseft.SparseAdamW(first.param_groups(model), lr=1e-2)
    its = Refresh.by_method(model, optimizer, first, "random", every=2, seed=1)
    run(model, optimizer, range(3))
    assert "others_trained" not in first.info
    with pytest.raises(ValueError, match="union of all its masks"):
        sparseft.save_delta(model, its.mask, tmp_path / "delta")
    sparseft.save_delta(model, first.union(its.mask), tmp_path / "delta")
    base = net()
    sparseft.load_delta(base, tmp_path / "delta")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, base.get_parameter(name)), name
