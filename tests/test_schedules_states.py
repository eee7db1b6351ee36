"""States of every schedule: what is missing or has another shape is refused before anything is changed."""

import copy
import re

import pytest
import torch
from torch import nn

import sparseft
from sparseft.schedules import DPS, LTSFT, ChildTuningF, DiffPruning, DPSMix, DropGrow, Mixout, Refresh


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 4)).to(dtype)


def run(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 12, generator=generator), torch.randint(0, 4, (8,), generator=generator)
        nn.functional.cross_entropy(model(x.to(next(model.parameters()))).float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(schedule, *values, dtype=torch.float32, state_bits=32, **options):
    """Return how a schedule is made that begins with whole parameters."""

    def make():
        model = net(dtype)
        optimizer = sparseft.SparseAdamW(model.parameters(), lr=1e-2, state_bits=state_bits)
        return model, optimizer, schedule(model, optimizer, *values, **options)

    return make


def sparse(schedule, *values, **options):
    """Return how a schedule is made that begins with a mask."""

    def make():
        model = net()
        mask = sparseft.select("random", model, density=0.2, dense="2.bias")
        optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=1e-2)
        return model, optimizer, schedule(model, optimizer, *values, mask=mask, **options)

    return make


def anew(model):
    return sparseft.select("random", model, density=0.3, dense="2.bias", seed=1)


# how it is made, and the steps after which it is saved
SCHEDULES = {
    "DPS in stage one": (whole(DPS, 0.5, stage_steps=3), 2),
    "DPS in stage two": (whole(DPS, 0.5, stage_steps=3), 4),
    "DPS in 16 bits": (whole(DPS, 0.5, stage_steps=3, dtype=torch.bfloat16), 4),
    "DPS with states of 8 bits": (whole(DPS, 0.5, stage_steps=3, state_bits=8), 4),
    "DPSMix in stage one": (whole(DPSMix, 0.5, stage_steps=3), 2),
    "DPSMix in stage two": (whole(DPSMix, 0.5, stage_steps=3), 4),
    "LTSFT before the choice": (whole(LTSFT, 0.2, 3), 2),
    "LTSFT after the choice": (whole(LTSFT, 0.2, 3), 4),
    "LTSFT in the second round": (whole(LTSFT, 0.2, 2, rounds=2, sparse_steps=2), 5),
    "DiffPruning at the start": (whole(DiffPruning, 0.2, 3), 0),
    "DiffPruning before the choice": (whole(DiffPruning, 0.2, 3), 2),
    "DiffPruning with gates of tensors": (whole(DiffPruning, 0.2, 3, structured=True), 2),
    "DiffPruning after the choice": (whole(DiffPruning, 0.2, 3), 4),
    "DropGrow": (sparse(DropGrow, every=2), 3),
    "Refresh": (sparse(Refresh, every=2, choose=anew), 3),
    "Mixout": (whole(Mixout, 0.5), 2),
    "Mixout of a mask": (sparse(Mixout, 0.5), 2),
    "ChildTuningF": (whole(ChildTuningF, 0.5), 2),
}

# fewer entries, or fewer states of them, make a state that there could be
COULD_BE = [("mask", "indices"), ("chosen", "indices"), ("left_out",)]
# say how a mask came to be
NOTES = {"info", "aliases", "fingerprint", "rest"}


def places(part, *path):
    """Yield the place of every part of a state, as the names that lead to it."""
    if path:
        yield path
    if isinstance(part, dict):
        for key, value in part.items():
            if key not in NOTES:
                yield from places(value, *path, key)
    elif isinstance(part, tuple):
        yield from (place for i, each in enumerate(part) for place in places(each, *path, i))


def changed(state, path, change):
    """Return a copy of a state in which the mapping or pair that holds a part was changed."""
    *outer, last = path
    state = holder = copy.deepcopy(state)
    for key in outer:
        if isinstance(holder[key], tuple):
            holder[key] = list(holder[key])
        holder = holder[key]
    change(holder, last)
    return state


def remove(holder, key):
    del holder[key]


def lengthen(holder, key):
    holder[key] = torch.cat([holder[key].reshape(-1), holder[key].reshape(-1)[:1], holder[key].reshape(-1)[:1]])


def replace(holder, key):
    holder[key] = "no such thing"


def damages(state):
    """Yield what may happen to a state, and the state to which it did."""
    for path in places(state):
        part = state
        for key in path:
            part = part[key]
        if path[:-1] not in COULD_BE:
            yield f"without {path}", changed(state, path, remove)
        if isinstance(part, torch.Tensor):
            yield f"longer {path}", changed(state, path, lengthen)
        yield f"other {path}", changed(state, path, replace)


def frozen(part):
    """Return a part of a state as plain values, which compare."""
    if isinstance(part, dict):
        return {key: frozen(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [frozen(value) for value in part]
    return part.tolist() if isinstance(part, torch.Tensor) else part


def everything(model, optimizer, schedule):
    return frozen([dict(model.state_dict()), optimizer.state_dict(), schedule.state_dict()])


def error(schedule, state):
    """Return what is wrong with a state, or "" if it is taken."""
    try:
        schedule.load_state_dict(state)
    except ValueError as its_error:
        return str(its_error)
    return ""


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_damaged_state_is_refused_and_nothing_is_changed(name):
    make, steps = SCHEDULES[name]
    model, optimizer, schedule = make()
    run(model, optimizer, range(steps))
    state = copy.deepcopy(schedule.state_dict())
    other, its_optimizer, its = make()
    run(other, its_optimizer, range(1))
    before, found = everything(other, its_optimizer, its), 0
    for what, damaged in damages(state):
        assert re.search(r"it is damaged|must be of a|indices of|every masked parameter", error(its, damaged)), what
        found += 1
    assert found > 10
    assert everything(other, its_optimizer, its) == before
    its.load_state_dict(state)
    assert frozen(its.state_dict()) == frozen(state)
