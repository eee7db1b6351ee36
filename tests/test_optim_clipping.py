"""Clipping inside of the step is what clip_grad_norm_ does to gradients of the selected entries alone."""

import copy

import pytest
import torch
from optimizers import PLAIN, TORCH, assert_same, model_and_groups, parameters_and_positions, train, weights

import sparseft
import sparseft.testing
from sparseft.optim import OPTIMIZERS, clipping

plain_optimizers = pytest.mark.parametrize("name", PLAIN)
every_device = pytest.mark.parametrize("device", sparseft.testing.devices())


def gradients(generator, parameters, step):
    """Large ones, small ones, and large ones that only entries outside of the index lists have."""
    for parameter in parameters:
        scale = (3.0, 1e-3, 0.2)[step % 3]
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter)
        parameter.grad.view(-1)[0] = 1e3


@plain_optimizers
@every_device
@pytest.mark.parametrize("max_norm", [0.5, 5.0])
def test_it_is_clip_grad_norm_of_the_selected_gradients(name, device, max_norm):
    """Over two groups; the reference holds the selected entries as parameters of their own."""
    model, groups = model_and_groups(device=device)
    parameters, indices = zip(*parameters_and_positions(model, groups), strict=True)
    indices = [index[index > 0].long() for index in indices]
    twins = [torch.nn.Parameter(p.detach().view(-1)[i]) for p, i in zip(parameters, indices, strict=True)]
    split = [{"params": parameters[:2], "indices": indices[:2]}, {"params": parameters[2:], "indices": indices[2:]}]
    ours = OPTIMIZERS[name](split, **PLAIN[name], max_norm=max_norm)
    reference = TORCH[name](twins, **PLAIN[name])
    generator, norms = torch.Generator().manual_seed(0), []
    for step in range(9):
        gradients(generator, parameters, step)
        for twin, parameter, index in zip(twins, parameters, indices, strict=True):
            twin.grad = parameter.grad.view(-1)[index].clone()
        norms.append(float(torch.nn.utils.clip_grad_norm_(twins, max_norm)))
        ours.step()
        reference.step()
    assert min(norms) < 0.5 < 5 < max(norms)
    for twin, parameter, index in zip(twins, parameters, indices, strict=True):
        torch.testing.assert_close(parameter.detach().view(-1)[index], twin.detach())


def test_a_group_without_it_counts_in_the_norm_and_is_not_clipped():
    clipped, free = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    groups = [{"params": [clipped], "max_norm": 1.0}, {"params": [free]}]
    optimizer = sparseft.SparseSGD(groups, lr=1.0)
    clipped.grad, free.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.step()
    torch.testing.assert_close((clipped.item(), free.item()), (-0.6, -4.0))


@plain_optimizers
def test_a_norm_that_is_never_reached_changes_no_bit(name):
    model, groups = model_and_groups()
    other, other_groups = model_and_groups()
    train(model, OPTIMIZERS[name](groups, **PLAIN[name], max_norm=1e6), 5)
    train(other, OPTIMIZERS[name](other_groups, **PLAIN[name]), 5)
    assert_same(weights(model), weights(other))


@plain_optimizers
@every_device
def test_a_loss_scale_is_taken_out_first(name, device):
    model, groups = model_and_groups(device=device)
    other, other_groups = model_and_groups(device=device)
    optimizer = OPTIMIZERS[name](groups, **PLAIN[name], max_norm=0.1)
    plain = OPTIMIZERS[name](other_groups, **PLAIN[name], max_norm=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
    for step in range(4):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step)).to(device)
        optimizer.zero_grad()
        scaler.scale(model(x).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        plain.zero_grad()
        other(x).square().sum().backward()
        plain.step()
    torch.testing.assert_close(weights(model), weights(other))


@every_device
def test_norms_of_16_bit_gradients_do_not_overflow(device):
    """The squares of 300 are beyond fp16."""
    weight = torch.nn.Parameter(torch.zeros(400, dtype=torch.float16, device=device))
    weight.grad = torch.full_like(weight, 300.0)
    index = torch.arange(400, device=device)
    indices = [torch.arange(0, 400, 2, device=device), index]
    norm = clipping.gradient_norm([([weight.grad, weight.grad], indices, [200, 400])])
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.item(), 300 * 600**0.5)


def test_the_norm_does_not_depend_on_how_much_is_gathered_at_a_time(monkeypatch):
    grads = [torch.randn(n) for n in (50, 7, 90, 1)]
    indices = [torch.arange(0, n, 3) for n in (50, 7, 90, 1)]
    norms = []
    for entries in (1, 20, 1 << 24):
        monkeypatch.setattr(clipping, "_AT_A_TIME", entries)
        norms.append(clipping.gradient_norm([(grads, indices, [len(index) for index in indices]), ([], [], [])]))
    wanted = torch.cat([grad[index] for grad, index in zip(grads, indices, strict=True)]).norm()
    torch.testing.assert_close(norms, [wanted] * 3)
    assert clipping.gradient_norm([([], [], [])]) is None


def test_a_step_without_gradients_is_none():
    model, groups = model_and_groups()
    before = copy.deepcopy(weights(model))
    sparseft.SparseAdamW(groups, max_norm=1.0).step()
    assert_same(before, weights(model))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
def test_no_step_waits_for_the_gpu():
    model, groups = model_and_groups(device="cuda")
    optimizer = sparseft.SparseAdamW(groups, max_norm=0.1)
    train(model, optimizer, 2)
    before = copy.deepcopy(weights(model))
    # a wait for the device raises
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert any(not torch.equal(old, new) for old, new in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_norms_out_of_range_are_refused(max_norm):
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        sparseft.SparseSGD([torch.nn.Parameter(torch.zeros(3))], max_norm=max_norm)
