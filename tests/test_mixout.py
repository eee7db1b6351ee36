"""Mixout against a loop over dense tensors."""

import pytest
import torch
from resuming import assert_resumes
from torch import nn
from torch.func import functional_call

import sparseft
from sparseft.schedules import Mixout

P = 0.3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 4))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def run(model, optimizer, steps):
    for step in steps:
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def make(model, sparse, **options):
    mask = sparseft.select("random", model, density=0.4) if sparse else None
    groups = mask.param_groups(model) if sparse else model.parameters()
    optimizer = sparseft.SparseAdamW(groups, lr=1e-2, weight_decay=0.1)
    return optimizer, Mixout(model, optimizer, P, mask, exclude="2.*", **options)


@pytest.mark.parametrize("sparse", [False, True])
def test_steps_are_those_of_a_loop_over_dense_tensors(sparse):
    model, other = net(), net()
    optimizer, schedule = make(model, sparse)
    first = other[0].weight.detach().clone()
    groups = schedule.mask.param_groups(other) if sparse else other.parameters()
    plain = sparseft.SparseAdamW(groups, lr=1e-2, weight_decay=0.1)
    for step in range(5):
        z = schedule._mixing.kept("0.weight", step).float()
        assert z.shape == first.shape
        parameters = dict(other.named_parameters())
        mixed = ((1 - z) * first + z * parameters["0.weight"] - P * first) / (1 - P)
        x, y = batch(step)
        loss = nn.functional.cross_entropy(functional_call(other, {**parameters, "0.weight": mixed}, (x,)), y)
        loss.backward()
        plain.step()
        plain.zero_grad()
        run(model, optimizer, [step])
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight, parameters[name], rtol=1e-4, atol=1e-6)
    x, _ = batch(9)
    assert not torch.equal(model(x), model.eval()(x))
    plain_output = functional_call(net(), dict(model.named_parameters()), (x,))
    assert torch.equal(model(x), plain_output)
    schedule.close()
    assert torch.equal(model.train()(x), plain_output)


def test_a_run_resumes_bit_for_bit():
    def ready():
        model = net()
        return model, *make(model, sparse=True)

    def spoil(model, schedule):
        schedule._mixing.pretrained["0.weight"].zero_()

    assert_resumes(ready, run, 3, 4, spoil)


def test_what_cannot_be_mixed_is_refused():
    model = net()
    optimizer = sparseft.SparseAdamW(model.parameters())
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1.0"):
        Mixout(model, optimizer, 1.0)
    with pytest.raises(TypeError, match=r"the probability of pretrained weights must be a number, got '0.5'"):
        Mixout(model, optimizer, "0.5")
    with pytest.raises(TypeError, match=r"seed must be a whole number, got 1.5"):
        Mixout(model, optimizer, 0.5, seed=1.5)
    with pytest.raises(ValueError, match="there is nothing to mix"):
        Mixout(model, optimizer, 0.5, exclude="*weight")
    assert list(Mixout(model, optimizer, 0.5)._mixing.pretrained) == ["0.weight", "2.weight"]
