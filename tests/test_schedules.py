"""Every schedule: counts optimizer steps, leaves bad ones out, resumes, refuses what does not fit."""

import copy

import pytest
import torch
from resuming import assert_resumes
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparseft
from sparseft.schedules import DPS, LTSFT, Refresh


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)).to(dtype)


def batch(step, rows=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 20, generator=generator), torch.randint(0, 4, (rows,), generator=generator)


def backward(model, step, scale=1.0):
    x, y = batch(step)
    weight = next(model.parameters())
    (nn.functional.cross_entropy(model(x.to(weight)).float(), y) * scale).backward()


def run(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same(one, other):
    for name, weight in one.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name


def whole(model, kind):
    """Return an optimizer of everything, and a schedule that chooses from it after two steps."""
    options = {"steps": 2} if kind is LTSFT else {"stage_steps": (2, 2)}
    optimizer = sparseft.SparseAdamW(model.parameters(), lr=1e-2)
    return optimizer, kind(model, optimizer, density=0.1, **options)


class Random:
    """Chooses other random entries at each call, and notes the calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model):
        assert torch.is_grad_enabled()
        self.calls += 1
        return sparseft.select("random", model, density=0.2, seed=self.calls)


def refreshing(model, every=2, optimizer=sparseft.SparseAdamW, choose=None, **options):
    mask = sparseft.select("random", model, density=0.2, seed=100)
    optimizer = optimizer(mask.param_groups(model), lr=1e-2, **options)
    return optimizer, Refresh(model, optimizer, mask, every=every, choose=choose or Random())


def test_masks_change_after_every_n_steps_and_nothing_else_moves():
    model = net()
    optimizer, schedule = refreshing(model, every=3, weight_decay=0.1)
    masks = [schedule.mask]
    for step in range(9):
        before = dict(zip(dict(model.named_parameters()), weights(model), strict=True))
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            moved = (parameter.detach() != before[name]).view(-1).nonzero().flatten().int()
            # between two choices it is one mask that trains
            assert torch.equal(moved, masks[-1][name] if name in masks[-1] else moved[:0]), (step, name)
        if schedule.mask != masks[-1]:
            masks.append(schedule.mask)
            assert schedule.steps % 3 == 0
    assert len(masks) == 4
    assert (schedule.steps, schedule.skipped) == (9, 0)


def test_forwards_accumulation_and_recomputation_are_no_steps():
    model, other = net(), net()
    optimizer, schedule = refreshing(model)
    for step in range(4):
        for part in range(3):
            x, y = batch(10 * step + part)
            hidden = checkpoint(model[0], x, use_reentrant=False)
            nn.functional.cross_entropy(model[2](model[1](hidden)), y).backward()
        model(x)
        assert schedule.steps == step
        optimizer.step()
        optimizer.zero_grad()
    optimizer.step()  # no gradients: nothing is updated
    assert schedule.steps == 4
    assert schedule._choose.calls == 2

    optimizer, _ = refreshing(other)
    for step in range(4):
        for part in range(3):
            backward(other, 10 * step + part)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model, other)


def test_a_closure_is_a_step():
    model, other = net(), net()
    optimizer, schedule = refreshing(model)
    plain, _ = refreshing(other)
    for step in range(4):

        def closure(step=step):
            optimizer.zero_grad()
            backward(model, step, scale=float("nan") if step == 1 else 1.0)
            return step

        assert optimizer.step(closure) == step
        if step != 1:
            plain.zero_grad()
            backward(other, step)
            plain.step()
    assert (schedule.steps, schedule.skipped) == (3, 1)
    assert_same(model, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_bad_gradients_changes_nothing_and_is_counted(bad):
    model, other = net(), net()
    optimizer, schedule = refreshing(model)
    plain, _ = refreshing(other)
    for step in range(6):
        backward(model, step)
        if step in (1, 3):
            chosen = next(iter(schedule.mask))
            model.get_parameter(chosen).grad.view(-1)[schedule.mask[chosen][-1]] = bad
        else:
            backward(other, step)
            plain.step()
            plain.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        assert not hasattr(optimizer, "found_inf")
    assert (schedule.steps, schedule.skipped) == (4, 2)
    assert schedule._choose.calls == 2
    assert_same(model, other)


@pytest.mark.parametrize("unscale", [False, True])
def test_steps_that_gradscaler_leaves_out_do_not_count(unscale):
    model, other = net(), net()
    optimizer, schedule = refreshing(model)
    plain, _ = refreshing(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        x, y = batch(step)
        loss = nn.functional.cross_entropy(model(x), y) * (float("inf") if step == 3 else 1.0)
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 3:
            backward(other, step)
            plain.step()
            plain.zero_grad()
    assert (schedule.steps, schedule.skipped) == (5, 1)
    assert scaler.get_scale() == 2.0**9
    for one, two in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("until", [1, 2, 3])
def test_a_run_resumes_bit_for_bit(until, dtype):
    def ready():
        model = net(dtype)
        return model, *refreshing(model)

    def choices_so_far(model, schedule):
        schedule._choose.calls = until // 2

    assert_resumes(ready, run, until, 4, choices_so_far)


def test_a_bad_step_that_an_error_ends_does_not_stop_the_next_ones():
    model = net()
    mask = sparseft.select("random", model, density=0.2)
    optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=1e-2)
    schedule = Refresh(model, optimizer, mask, every=5, choose=lambda model: mask)

    def fail(*_):
        raise RuntimeError("no")

    handle = optimizer.register_step_pre_hook(fail)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    handle.remove()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert (schedule.steps, schedule.skipped) == (1, 0)
    assert not hasattr(optimizer, "found_inf")
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_closed_schedule_lets_the_optimizer_go_on():
    model = net()
    optimizer, schedule = refreshing(model)
    backward(model, 0)
    optimizer.step()
    with pytest.warns(match="ended after 1 steps, before its choice at step 2"):
        schedule.close()
    for _ in range(3):
        optimizer.step()
    assert (schedule.steps, schedule._choose.calls) == (1, 0)
    again = Refresh(model, optimizer, schedule.mask, every=1, choose=Random())
    optimizer.step()
    assert again.steps == 1


def test_what_does_not_fit_is_refused():
    model = net()
    optimizer, schedule = refreshing(model)
    mask, other = schedule.mask, sparseft.select("random", model, density=0.2, seed=5)
    options = {"every": 2, "choose": Random()}
    with pytest.raises(RuntimeError, match="has a schedule already"):
        Refresh(model, optimizer, mask, **options)
    schedule.close()
    with pytest.raises(ValueError, match="every must be at least 1 optimizer step, got 0"):
        Refresh(model, optimizer, mask, every=0, choose=Random())
    with pytest.raises(TypeError, match="every must be a whole number"):
        Refresh(model, optimizer, mask, every=2.0, choose=Random())
    with pytest.raises(TypeError, match=r"choose must be called with the model .* got 'fish'"):
        Refresh(model, optimizer, mask, every=2, choose="fish")
    with pytest.raises(TypeError, match=r"mask must be a sparseft\.Mask, got NoneType"):
        Refresh.by_method(model, optimizer, None, "random", every=2)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got SparseAdamW"):
        Refresh(optimizer, model, mask, **options)
    with pytest.raises(ValueError, match=r"must train what the schedule begins with, .*other entries of 0.weight"):
        Refresh(model, optimizer, other, **options)
    with pytest.raises(ValueError, match=r"got no entries of 0.weight"):
        Refresh(copy.deepcopy(model), optimizer, mask, **options)
    with pytest.raises(ValueError, match="the mask is of another model"):
        Refresh(nn.Linear(3, 4), optimizer, mask, **options)
    with pytest.raises(TypeError, match="optimizers of this package have, got AdamW"):
        Refresh(model, torch.optim.AdamW(model.parameters()), mask, **options)
    with sparseft.compact_gradients(model, mask), pytest.raises(RuntimeError, match="leave compact_gradients first"):
        Refresh(model, sparseft.SparseAdamW(mask.param_groups(model)), mask, **options)
    again = Refresh(model, optimizer, mask, **options)
    with pytest.raises(ValueError, match=r"must be of a Refresh with \{'every': 2\}, got \{'every': 3\}"):
        again.load_state_dict({**again.state_dict(), "options": {"every": 3}})


def test_another_mask_than_the_schedules_is_found_at_the_next_step():
    model = net()
    optimizer, schedule = refreshing(model)
    other = sparseft.select("random", model, density=0.2, seed=5)
    optimizer.set_mask(other, model)
    backward(model, 0)
    before = weights(model)
    with pytest.raises(RuntimeError, match="trains other entries than its Refresh chose"):
        optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, weights(model), strict=True))
    optimizer.set_mask(schedule.mask, model)
    optimizer.step()
    assert schedule.steps == 1


def assigned(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def given_another_layer(model):
    model[2] = nn.Linear(30, 4)


def converted(model):
    model.double()


def resized(model):
    model[2].weight.data = torch.zeros(5, 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (assigned, "0.weight of the model is not the parameter that the optimizer trains: it was replaced since"),
        (given_another_layer, "2.weight of the model is not the parameter"),
        (converted, r"0.weight was torch.float32 \[30, 20\] and is torch.float64 \[30, 20\]: it was converted"),
        (resized, r"2.weight was torch.float32 \[4, 30\] and is torch.float32 \[5, 30\]"),
    ],
)
@pytest.mark.parametrize("make", [refreshing, lambda model: whole(model, LTSFT), lambda model: whole(model, DPS)])
def test_a_model_that_changed_under_its_optimizer_is_found_at_the_next_step(change, message, make):
    model = net()
    optimizer, schedule = make(model)[:2]
    run(model, optimizer, range(1))
    change(model)
    before = weights(model)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, weights(model), strict=True))
    assert schedule.steps == 1


def test_steps_in_backward_are_refused():
    model = net()
    optimizer, _ = refreshing(model)
    before = weights(model)
    with sparseft.step_in_backward(optimizer), pytest.raises(RuntimeError, match="this one is taken in backward"):
        backward(model, 0)
    assert all(torch.equal(old, new) for old, new in zip(before, weights(model), strict=True))


def test_a_choice_that_is_no_mask_is_refused_and_the_step_is_not_lost():
    model = net()
    optimizer, schedule = refreshing(model, every=1, choose=lambda model: None)
    mask = schedule.mask
    backward(model, 0)
    with pytest.raises(TypeError, match="choose must return the next mask, got NoneType"):
        optimizer.step()
    assert (schedule.mask, schedule.steps) == (mask, 0)


def test_a_choice_of_other_parameters_is_refused_and_the_step_is_not_lost():
    model = net()
    choices = [sparseft.select("random", model, density=0.2, include="0.*"), None]
    optimizer, schedule = refreshing(model, every=1, choose=lambda model: choices[0])
    backward(model, 0)
    with pytest.raises(ValueError, match="must return a mask of the same parameters as before"):
        optimizer.step()
    assert schedule.steps == 0
    choices[0] = sparseft.select("random", model, density=0.2, seed=9)
    optimizer.step()
    assert schedule.mask == choices[0]


@pytest.mark.parametrize("by_name", [False, True])
def test_a_model_whose_rest_is_frozen_is_refused(by_name):
    model = net()
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    mask = sparseft.Mask({names[0]: torch.arange(5)}, shapes)

    def schedule():
        optimizer = sparseft.SparseAdamW(mask.param_groups(model))
        if by_name:
            return optimizer, Refresh.by_method(model, optimizer, mask, "magnitude", every=1)
        return optimizer, Refresh(model, optimizer, mask, every=1, choose=Random())

    optimizer, running = schedule()
    mask.freeze_rest(model)
    backward(model, 0)
    with pytest.raises(
        ValueError, match=r"got 3 of them frozen, 0.bias the first; leave mask.freeze_rest\(model\) out"
    ):
        optimizer.step()
    assert (running.mask, running.steps) == (mask, 0)
    running.close()
    with pytest.raises(ValueError, match="got 3 of them frozen"):
        schedule()
    model.requires_grad_(True)
    optimizer, running = schedule()
    backward(model, 1)
    optimizer.step()
    assert running.steps == 1


def batches(count=3):
    return [batch(100 + step) for step in range(count)]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fish", {"samples": 16}),
        ("fish", {"density": 0.1, "scope": "tensor"}),
        ("sift", {"k": 50}),
        ("gps", {"objective": "task", "per_group": 2}),
        ("wanda", {"structure": "row", "density": 0.3}),
        ("magnitude", {}),
        ("random", {}),
    ],
)
def test_masks_by_a_method_are_those_that_select_gives_then(method, options):
    model, data = net(), batches()
    # the head's bias trains whole, the other one not at all
    mask = sparseft.select("random", model, density=0.2, include="*.weight", dense="2.bias")
    budget = options if options.keys() & {"density", "k", "per_group"} else {**options, "k": mask.k}
    optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=1e-2)
    options = {**options, "progress": False}
    schedule = Refresh.by_method(model, optimizer, mask, method, data, every=2, seed=5, **options)
    for step in range(5):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            expected = sparseft.select(
                method, model, data, include="*.weight", dense="2.bias", seed=5 + step + 1, progress=False, **budget
            )
            assert schedule.mask == expected
            assert schedule.mask != mask
            mask = schedule.mask
        assert schedule.mask == mask


@pytest.mark.parametrize(
    ("method", "data", "options", "error", "message"),
    [
        ("fisch", batches(), {}, ValueError, "method must be one of .*, got 'fisch'"),
        ("fish", None, {}, ValueError, "method 'fish' needs data"),
        ("fish", iter(batches()), {}, ValueError, "readable more than once, got list_iterator"),
        ("fish", batches(), {"sample": 3}, TypeError, "method 'fish' has no option sample"),
        ("fish", batches(), {"include": "0.*"}, ValueError, "are the mask's, got include"),
        ("fish", batches(), {"density": 1.5}, ValueError, r"density must lie in \(0, 1\], got 1.5"),
        ("fish", batches(), {"density": 0.1, "k": 3}, ValueError, "either density or k"),
        ("fish", batches(), {"scope": "neuron"}, ValueError, "scope must be one of"),
        ("bitfit", None, {}, ValueError, "chooses by names alone"),
        ("random", None, {"every": 0}, ValueError, "every must be at least 1"),
    ],
)
def test_a_method_that_could_not_choose_is_refused_at_the_beginning(method, data, options, error, message):
    model = net()
    mask = sparseft.select("random", model, density=0.2)
    optimizer = sparseft.SparseAdamW(mask.param_groups(model))
    with pytest.raises(error, match=message):
        Refresh.by_method(model, optimizer, mask, method, data, **{"every": 2, **options})
    Refresh.by_method(model, optimizer, mask, "random", every=1)
