"""Drop and grow against an exchange over dense tensors; what is not selected is pretrained at all times."""

import math

import pytest
import torch
from resuming import assert_resumes
from torch import nn

import sparseft
from sparseft.schedules import DropGrow


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 4)).to(dtype)


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator)
    nn.functional.cross_entropy(model(x.to(next(model.parameters()))).float(), y).backward()


def run(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def make(model, every=3, **options):
    mask = sparseft.select("random", model, density=0.2, include="*weight", dense="2.bias", scope="tensor")
    optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=1e-2, weight_decay=0.1)
    return optimizer, DropGrow(model, optimizer, mask, every=every, **options)


@pytest.mark.parametrize("until", [None, 7])
def test_the_least_changed_go_and_the_largest_gradients_come(until):
    model, first = net(), net()
    optimizer, schedule = make(model, fraction=0.4, until=until)
    exchanged = 0
    for step in range(12):
        old = schedule.mask
        backward(model, step)
        optimizer.step()
        steps = step + 1
        fraction = 0.4 if until is None else 0.2 * (1 + math.cos(math.pi * steps / until))
        acts = steps % 3 == 0 and (until is None or steps <= until)
        for name in old:
            weight, base = model.get_parameter(name).detach().flatten(), first.get_parameter(name).detach().flatten()
            new = schedule.mask[name]
            assert new.numel() == old[name].numel()
            outside = torch.ones(weight.numel(), dtype=torch.bool).index_fill_(0, new.long(), False)
            assert torch.equal(weight[outside], base[outside]), (step, name)
            count = math.floor(fraction * new.numel()) if acts else 0
            gone = sorted(set(old[name].tolist()) - set(new.tolist()))
            come = sorted(set(new.tolist()) - set(old[name].tolist()))
            assert len(gone) == len(come) == count, (step, name)
            exchanged += count
            if count:
                grad = model.get_parameter(name).grad.flatten().abs()
                grad[old[name].long()] = -1
                assert come == sorted(grad.topk(count).indices.tolist())
        optimizer.zero_grad()
    assert exchanged > 20
    # pretrained values are known of what is selected now
    for name, values in schedule._pretrained.items():
        assert torch.equal(values, first.get_parameter(name).detach().flatten()[schedule.mask[name].long()])


def test_exactly_the_nearest_entries_are_dropped():
    model, first = net(), net()
    optimizer, schedule = make(model, every=1, fraction=0.5)
    old = schedule.mask
    alone = sparseft.SparseAdamW(old.param_groups(first), lr=1e-2, weight_decay=0.1)
    backward(first, 0)
    alone.step()
    run(model, optimizer, [0])
    for name in old:
        moved = (first.get_parameter(name) - net().get_parameter(name)).detach().flatten().abs()[old[name].long()]
        kept = set(old[name][moved.argsort(descending=True)[: -(old[name].numel() // 2)]].tolist())
        assert kept == set(old[name].tolist()) & set(schedule.mask[name].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("until", [2, 3, 5])
def test_a_run_resumes_bit_for_bit(until, dtype):
    def ready():
        model = net(dtype)
        return model, *make(model, until=11)

    assert_resumes(ready, run, until, 5)


def test_a_tensor_of_which_almost_all_is_selected_exchanges_what_is_left():
    model = net()
    indices = {"0.weight": torch.arange(478, dtype=torch.int32), "2.weight": torch.arange(120, dtype=torch.int32)}
    mask = sparseft.Mask(indices, {"0.weight": (30, 16), "2.weight": (4, 30)})
    optimizer = sparseft.SparseSGD(mask.param_groups(model), lr=0.1)
    schedule = DropGrow(model, optimizer, mask, every=1)
    run(model, optimizer, [0])
    assert {478, 479} <= set(schedule.mask["0.weight"].tolist())
    assert schedule.mask["2.weight"].numel() == 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1 optimizer step, got 0"),
        ({"fraction": 0.0}, r"fraction must lie in \(0, 1\], got 0.0"),
        ({"until": 2}, "until must be at least 3, the step of the first exchange, got 2"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(net(), **options)


@pytest.mark.parametrize("options", [{"every": 2.5}, {"until": 7.0}])
def test_steps_are_whole_numbers(options):
    with pytest.raises(TypeError, match="must be a whole number, got"):
        make(net(), **options)


def test_a_fraction_is_a_number():
    with pytest.raises(TypeError, match="fraction must be a number, got 'x'"):
        make(net(), fraction="x")


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_outside_of_the_mask_that_are_not_finite_are_not_grown(bad):
    model = net()
    optimizer, schedule = make(model, every=1)
    name = "0.weight"
    outside = min(set(range(model[0].weight.numel())) - set(schedule.mask[name].tolist()))
    backward(model, 0)
    model[0].weight.grad.view(-1)[outside] = bad
    optimizer.step()
    assert schedule.steps == 1
    assert schedule.mask.info["exchanged_at"] == 1
    assert outside not in schedule.mask[name].tolist()
