"""Child-Tuning-F against Adam over dense tensors, as its paper's algorithm has it."""

import math

import pytest
import torch
from resuming import assert_resumes
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparseft
from sparseft.schedules import ChildTuningF
from sparseft.testing import devices

LR, DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.999), 1e-8


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 4)).to(dtype)


def backward(model, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator)
    weight = next(model.parameters())
    (nn.functional.cross_entropy(model(x.to(weight)).float(), y.to(weight.device)) * scale).backward()


def adamw(model, mask=None, **options):
    params = model.parameters() if mask is None else mask.param_groups(model)
    return sparseft.SparseAdamW(params, lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS, **options)


def make(p=0.3, dtype=torch.float32, **options):
    model = net(dtype)
    optimizer = adamw(model)
    return model, optimizer, ChildTuningF(model, optimizer, p, **options)


def run(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("p", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("device", devices())
def test_steps_are_those_of_the_papers_algorithm(p, device):
    model = net().to(device)
    optimizer = adamw(model)
    ChildTuningF(model, optimizer, p, exclude="2.*", seed=3)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    means, squares = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    still_moved = 0
    for step in range(1, 7):
        backward(model, step)
        whole = gradients(model)
        optimizer.step()
        for name, seen in gradients(model).items():
            drawn = (seen != 0).float() if name.startswith("0") else torch.ones_like(seen)
            grad = whole[name] * drawn / (p if name.startswith("0") else 1)
            torch.testing.assert_close(seen, grad, rtol=1e-6, atol=0)
            means[name] = BETAS[0] * means[name] + (1 - BETAS[0]) * grad
            squares[name] = BETAS[1] * squares[name] + (1 - BETAS[1]) * grad**2
            root = (squares[name] / (1 - BETAS[1] ** step)).sqrt() + EPS
            change = LR * means[name] / (1 - BETAS[0] ** step) / root + LR * DECAY * weights[name]
            still_moved += int(((drawn == 0) & (means[name] != 0) & (change != 0)).sum())
            weights[name] -= change
            torch.testing.assert_close(model.get_parameter(name).detach(), weights[name], rtol=1e-4, atol=2e-6)
        optimizer.zero_grad()
    assert (still_moved > 100) == (p < 1)


def test_draws_are_bernoulli_and_others_at_each_step_and_place():
    model = nn.ParameterDict({"a": torch.zeros(100, 100), "b": torch.zeros(100, 100)})
    optimizer = sparseft.SparseSGD(model.parameters(), lr=0.0)
    ChildTuningF(model, optimizer, 0.3)
    draws = []
    for _ in range(3):
        for parameter in model.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        draws += [parameter.grad != 0 for parameter in model.values()]
        assert {0.0, float(torch.ones(()).div(0.3))} == set(model["a"].grad.unique().tolist())
    spread = math.sqrt(0.3 * 0.7 / 10_000)
    for i, one in enumerate(draws):
        assert abs(float(one.float().mean()) - 0.3) < 4 * spread
        for other in draws[:i]:
            both = float((one & other).float().mean())
            assert abs(both - 0.09) < 4 * math.sqrt(0.09 * 0.91 / 10_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mask_is_what_moves_and_drawn_gradients_are_right_in_every_dtype(dtype):
    model, first = net(dtype), net(dtype)
    mask = sparseft.select("random", model, density=0.3, dense="2.bias")
    optimizer = adamw(model, mask)
    ChildTuningF(model, optimizer, 0.4, mask)
    for step in range(3):
        backward(model, step)
        whole = gradients(model)
        optimizer.step()
        for name, grad in gradients(model).items():
            drawn = grad != 0
            assert grad.dtype == dtype
            torch.testing.assert_close(grad[drawn].double(), whole[name][drawn].double() / 0.4, rtol=2**-7, atol=1e-6)
        optimizer.zero_grad()
    for name, weight in model.named_parameters():
        moved = (weight != first.get_parameter(name)).flatten()
        if name in mask:
            assert moved.sum() > mask[name].numel() // 4
            moved[mask[name].long()] = False
            assert not moved.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("until", [1, 4])
def test_a_run_resumes_bit_for_bit(until, dtype):
    assert_resumes(lambda: make(dtype=dtype), run, until, 4)


def test_another_seed_draws_others():
    models = [make(seed=seed) for seed in (0, 0, 1)]
    for model, optimizer, _ in models:
        run(model, optimizer, range(2))
    one, same, other = (model[0].weight for model, _, _ in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_accumulated_gradients_are_drawn_once_and_recomputation_changes_nothing():
    (model, optimizer, schedule), (other, plain, _) = make(), make()
    for step in range(3):
        for part in range(2):
            generator = torch.Generator().manual_seed(10 * step + part)
            x, y = torch.randn(8, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator)
            nn.functional.cross_entropy(checkpoint(model, x, use_reentrant=False), y).backward()
            backward(other, 10 * step + part)
        whole = gradients(other)
        for each in (optimizer, plain):
            each.step()
        for name, grad in gradients(model).items():
            drawn = grad != 0
            torch.testing.assert_close(grad[drawn], whole[name][drawn] / 0.3)
        for each in (optimizer, plain):
            each.zero_grad()
    assert schedule.steps == 3
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_leaves_the_step_out_whether_or_not_it_is_drawn(bad):
    (model, optimizer, schedule), (other, plain, _) = make(), make()
    for entry in range(6):
        backward(model, 0)
        model[0].bias.grad[entry] = bad
        optimizer.step()
        optimizer.zero_grad()
    run(model, optimizer, range(3))
    run(other, plain, range(3))
    assert (schedule.steps, schedule.skipped) == (3, 6)
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in model.named_parameters())


def test_a_16_bit_gradient_that_overflows_when_it_is_divided_leaves_the_step_out():
    model, optimizer, schedule = make(p=0.5, dtype=torch.float16)
    before = model[0].weight.detach().clone()
    backward(model, 0)
    model[0].weight.grad.fill_(60_000.0)
    optimizer.step()
    assert (schedule.steps, schedule.skipped) == (0, 1)
    assert torch.equal(model[0].weight, before)


def test_gradscaler_changes_nothing_but_the_steps_it_leaves_out():
    (model, optimizer, schedule), (other, plain, _) = make(), make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(5):
        backward(model, step, float("inf") if step == 2 else float(scaler.scale(torch.ones(()))))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 2:
            run(other, plain, [step])
    assert (schedule.steps, schedule.skipped) == (4, 1)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, other.get_parameter(name), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.0}, r"must lie in \(0, 1\], got 0.0"),
        ({"p": 1.5}, r"must lie in \(0, 1\], got 1.5"),
        ({"exclude": "*"}, "exclude leaves no parameter"),
        ({"exclude": "head*"}, r"exclude pattern 'head\*' matches no parameter"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": "0.5"}, "p must be a number, got '0.5'"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": "a"}, "seed must be a whole number, got 'a'"),
        ({"mask": "best.mask"}, "mask must be a sparseft.Mask, got str"),
    ],
)
def test_arguments_of_the_wrong_type_are_named_and_the_optimizer_stays_free(options, message):
    model = nn.Linear(4, 3)
    optimizer = sparseft.SparseAdamW(model.parameters())
    with pytest.raises(TypeError, match=message):
        ChildTuningF(model, optimizer, **{"p": 0.5, **options})
    ChildTuningF(model, optimizer, 0.5)
