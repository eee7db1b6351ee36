"""Steps in backward: the same weights as ordinary steps, no two gradients at a time, and what cannot go with it."""

import copy

import pytest
import torch
from torch import nn

import sparseft

OPTIMIZERS = {
    "SparseAdamW": lambda groups, **options: sparseft.SparseAdamW(groups, lr=1e-2, **options),
    "SparseSGD": lambda groups, **options: sparseft.SparseSGD(groups, lr=1e-2, momentum=0.9, **options),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
}


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Linear(24, 12))
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    return model


def loss(model, step):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(step))
    # the last layer is used twice: its gradient is complete only after both uses
    return model[3](model[2](model(x) @ torch.ones(12, 24))).square().mean()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_same_weights_as_with_ordinary_steps(make, compact):
    if not compact and make is OPTIMIZERS["AdamW"]:
        pytest.skip("torch's own optimizer trains whole parameters without compact gradients")
    ordinary, inside = net(), net()
    mask = sparseft.select("random", ordinary, density=0.2)
    for model in (ordinary, inside):
        context = sparseft.compact_gradients(model, mask)
        if compact:
            context.__enter__()
        optimizer = make(mask.param_groups(model))
        if model is inside:
            with sparseft.step_in_backward(optimizer):
                for step in range(4):
                    loss(model, step).backward()
                    assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
        for step in range(4 if model is ordinary else 0):
            loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        if compact:
            context.__exit__(None, None, None)
    before = net()
    for name, weight in ordinary.named_parameters():
        assert torch.equal(weight, inside.get_parameter(name)), name
        assert name not in mask or not torch.equal(weight, before.get_parameter(name))


def test_no_two_gradients_exist():
    model = net()
    params = list(model.parameters())
    alive = []
    handles = [p.register_hook(lambda grad: alive.append(sum(p.grad is not None for p in params))) for p in params]
    with sparseft.step_in_backward(torch.optim.SGD(params, lr=0.1)):
        loss(model, 0).backward()
    assert len(alive) >= len(params)
    assert max(alive) == 0
    assert len(handles) == len(params)


def test_what_needs_all_gradients_is_refused():
    model = net()
    optimizer = sparseft.SparseAdamW(model.parameters(), lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    with sparseft.step_in_backward(optimizer), pytest.raises(RuntimeError, match="steps are taken in backward"):
        optimizer.step()
    loss(model, 0).backward()
    with pytest.raises(RuntimeError, match="there are gradients already"), sparseft.step_in_backward(optimizer):
        pass
    clipping = sparseft.SparseAdamW(model.parameters(), lr=1e-2, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm must be None"), sparseft.step_in_backward(clipping):
        pass
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_everything_is_taken_off():
    model = net()
    optimizer = sparseft.SparseSGD(model.parameters(), lr=1e-2)
    with sparseft.step_in_backward(optimizer):
        loss(model, 0).backward()
    before = copy.deepcopy(model.state_dict())
    loss(model, 1).backward()
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    optimizer.step()
    assert not any(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
