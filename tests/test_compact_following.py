"""Leaves and weights follow each other: at steps, between them, in files, and when a context is entered again."""

import copy

import pytest
import torch
from compacts import every_optimizer, inputs, mask_of, net, shapes_of
from models import one_thread  # noqa: F401

import sparseft
from sparseft.mask import Mask


@every_optimizer
def test_weights_changed_from_outside_win(make_optimizer, tmp_path):
    model = net()
    mask = mask_of(model)
    sparseft.save_delta(model, mask, tmp_path / "base.safetensors")
    saved = copy.deepcopy(model.state_dict())
    with sparseft.compact_gradients(model, mask) as compact:
        optimizer = make_optimizer(mask.param_groups(model))
        for _ in range(2):
            model(inputs()).square().mean().backward()
            optimizer.step()
        model.load_state_dict(saved)
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        model(inputs()).square().mean().backward()
        optimizer.step()
        for name, leaf in compact.entries.items():
            torch.testing.assert_close(leaf.detach(), saved[name].reshape(-1)[mask[name].long()], rtol=1e-6, atol=1e-7)


@every_optimizer
def test_an_optimizer_goes_on_when_the_context_is_entered_again(make_optimizer):
    def train(model, compact, mask, optimizer, steps):
        for step in steps:
            model(inputs(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    once, twice = net(), net()
    mask = mask_of(once)
    with sparseft.compact_gradients(once, mask) as compact:
        train(once, compact, mask, make_optimizer(mask.param_groups(once)), range(6))
    compact = sparseft.compact_gradients(twice, mask)
    with compact:
        optimizer = make_optimizer(mask.param_groups(twice))
        train(twice, compact, mask, optimizer, range(3))
    twice(inputs()).sum().backward()
    twice.zero_grad()
    with compact:
        train(twice, compact, mask, optimizer, range(3, 6))
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(a, b)


def minimised(model, groups):
    optimizer = torch.optim.LBFGS([p for group in groups for p in group["params"]], max_iter=20)
    x = inputs()
    target = x[:, :4].sin()

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(closure())


def test_an_optimizer_that_looks_again_in_the_middle_of_a_step():
    """L-BFGS evaluates its closure after each change of the leaves: the weights must have it by then."""
    model = net()
    every = Mask({name: torch.arange(p.numel()) for name, p in model.named_parameters()}, shapes_of(model))
    plain = copy.deepcopy(model)
    want = minimised(plain, [{"params": list(plain.parameters())}])
    with sparseft.compact_gradients(model, every):
        got = minimised(model, every.param_groups(model))
    assert got < 0.3
    assert abs(got - want) < 0.02


def test_leaves_changed_by_hand_are_in_the_weights():
    model = net()
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask) as compact:
        with torch.no_grad():
            for leaf in compact.entries.values():
                leaf.add_(1)
        wanted = {name: leaf.detach().clone() for name, leaf in compact.entries.items()}
    for name, want in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).detach().view(-1)[mask[name].long()], want)


@every_optimizer
def test_a_new_context_of_the_same_mask_has_the_same_leaves(make_optimizer):
    model = net()
    mask, optimizer, before = mask_of(model), None, copy.deepcopy(model.state_dict())
    for _ in range(2):
        with sparseft.compact_gradients(model, mask):
            optimizer = optimizer or make_optimizer(mask.param_groups(model))
            model(inputs()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            after = copy.deepcopy(model.state_dict())
        assert not torch.equal(before["0.weight"], after["0.weight"])
        before = after


def test_an_average_made_inside_follows_the_weights():
    model = net()
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask):
        average = torch.optim.swa_utils.AveragedModel(model)
        average.update_parameters(model)
        for mean, weight in zip(average.module.parameters(), model.parameters(), strict=False):
            assert mean.shape == weight.shape
            assert torch.equal(mean, weight)


def test_a_low_precision_run_goes_on_where_it_was_saved(tmp_path):
    """The leaves' digits beyond the weights' are in the optimizer's state."""

    def steps(model, optimizer, which):
        for step in which:
            model(inputs(step, torch.bfloat16)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, resumed = net(torch.bfloat16), net(torch.bfloat16)
    mask = mask_of(whole)
    with sparseft.compact_gradients(whole, mask):
        optimizer = sparseft.SparseAdamW(mask.param_groups(whole), lr=1e-4)
        steps(whole, optimizer, range(5))
        torch.save([whole.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
        steps(whole, optimizer, range(5, 10))
    weights, state = torch.load(tmp_path / "saved.pt")
    with sparseft.compact_gradients(resumed, mask) as compact:
        optimizer = sparseft.SparseAdamW(mask.param_groups(resumed), lr=1e-4)
        resumed.load_state_dict(weights)
        optimizer.load_state_dict(state)
        assert any(not torch.equal(leaf, leaf.to(torch.bfloat16).float()) for leaf in compact.entries.values())
        steps(resumed, optimizer, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("by_data", [False, True])
def test_a_sharpness_aware_step(by_data):
    """Leaves are moved, gradients taken there, and leaves put back by hand right before the step."""

    def step(params, run, optimizer):
        run().backward()
        kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.add_(0.1 * p.grad)
        optimizer.zero_grad()
        run().backward()
        for p, old in zip(params, kept, strict=True):
            if by_data:
                p.data = old
            else:
                p.detach().copy_(old)
        optimizer.step()
        optimizer.zero_grad()

    model = net()
    every = Mask({name: torch.arange(p.numel()) for name, p in model.named_parameters()}, shapes_of(model))
    plain = copy.deepcopy(model)
    params = list(plain.parameters())
    optimizer = torch.optim.SGD(params, lr=0.5)
    for _ in range(3):
        step(params, lambda: plain(inputs()).square().mean(), optimizer)
    with sparseft.compact_gradients(model, every) as compact:
        leaves = list(compact.entries.values())
        optimizer = torch.optim.SGD(leaves, lr=0.5)
        for _ in range(3):
            step(leaves, lambda: model(inputs()).square().mean(), optimizer)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
