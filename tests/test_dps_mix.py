"""DPS Mix against a loop over dense tensors; mixed layers."""

import copy

import pytest
import torch
from resuming import assert_resumes
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import sparseft
from sparseft.schedules import DPSMix

STAGES, P = (4, 3), 0.25


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 4))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def loss(model, step):
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x), y)


def make(model, **options):
    optimizer = sparseft.SparseSGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, DPSMix(model, optimizer, 1 - P, stage_steps=STAGES, **options)


def run(model, optimizer, steps):
    for step in steps:
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("penalty", [False, True])
def test_three_cycles_are_those_of_a_loop_over_dense_tensors(penalty):
    model, other = net(), net()
    optimizer, schedule = make(model, frequency_penalty=penalty, seed=3)
    parameters = {name: p.detach() for name, p in other.named_parameters()}
    mixed_names = ["0.weight", "2.weight"]
    first = {name: p.clone() for name, p in parameters.items()}
    buffers = {name: torch.zeros_like(p) for name, p in parameters.items()}
    squares, counts, masks = {}, {}, {}
    for step in range(3 * sum(STAGES)):
        place = step % sum(STAGES)
        if place == 0:
            squares = {name: torch.zeros_like(first[name]) for name in mixed_names}
            counts = {name: torch.zeros(first[name].shape[1]) for name in mixed_names}
            masks = {name: torch.ones_like(p) for name, p in parameters.items()}
        own = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        used = dict(own)
        if place < STAGES[0]:
            for name in mixed_names:
                z = schedule._mixing.kept(name, step).float()
                used[name] = ((1 - z) * first[name] + z * own[name] - P * first[name]) / (1 - P)
                counts[name] += z.flatten()
        x, y = batch(step)
        nn.functional.cross_entropy(functional_call(other, used, (x,)), y).backward()
        for name, p in parameters.items():
            grad = own[name].grad
            if place < STAGES[0] and name in mixed_names:
                squares[name] += grad**2
            buffer = 0.9 * buffers[name] + grad if step else grad
            buffers[name] = torch.where(masks[name] == 1, buffer, buffers[name])
            p -= 0.1 * buffers[name] * masks[name]
        if place == STAGES[0] - 1:
            for name in mixed_names:
                score = squares[name] / counts[name].clamp(min=1)
                score = score * torch.exp(-counts[name] / STAGES[0]) if penalty else score
                chosen = score.flatten().argsort(descending=True, stable=True)[: round((1 - P) * score.numel())]
                masks[name] = torch.zeros(score.numel()).scatter(0, chosen, 1.0).view_as(score)
        run(model, optimizer, [step])
        for name, p in parameters.items():
            torch.testing.assert_close(model.get_parameter(name).detach(), p, rtol=1e-4, atol=1e-6)
        if schedule.stage == 2:
            for name in mixed_names:
                assert torch.equal(schedule.mask[name].long(), masks[name].flatten().nonzero().flatten())


def test_layers_mix_in_training_of_stage_one_alone():
    model = net()
    optimizer, schedule = make(model)
    run(model, optimizer, range(3))
    x, _ = batch(9)
    plain = functional_call(net(), dict(model.named_parameters()), (x,))
    mixed = model(x)
    assert not torch.equal(mixed, plain)
    assert torch.equal(mixed, model(x))
    assert torch.equal(mixed, checkpoint(model, x, use_reentrant=False))
    assert torch.equal(copy.deepcopy(model)(x), plain)
    assert torch.equal(model.eval()(x), plain)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in net().named_parameters()]
    assert not any("weight" in vars(module) for module in model.modules())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model.train()(torch.randn(2, 3))
    assert not any("weight" in vars(module) for module in model.modules())
    run(model, optimizer, [3])
    assert schedule.stage == 2
    assert torch.equal(model(x), functional_call(net(), dict(model.named_parameters()), (x,)))
    run(model, optimizer, range(4, 8))
    assert schedule.stage == 1
    mixed = model(x)
    schedule.close()
    assert not torch.equal(model(x), mixed)
    assert torch.equal(model(x), functional_call(net(), dict(model.named_parameters()), (x,)))


def test_draws_are_of_columns_and_the_mean_is_the_weight():
    model = net()
    _, schedule = make(model)
    mixing, weight = schedule._mixing, model[0].weight.detach() + 1
    draws = torch.stack([mixing.kept("0.weight", step) for step in range(2000)])
    assert draws.shape == (2000, 1, 16)
    assert draws.float().mean() == pytest.approx(1 - P, abs=0.01)
    together = draws[:, 0].float().T.cov()
    assert (together - together.diag().diag()).abs().max() < 0.03
    mean = torch.stack([mixing.mixed("0.weight", weight, step) for step in range(2000)]).mean(0)
    torch.testing.assert_close(mean, weight, rtol=0, atol=0.05)
    assert not torch.equal(draws[:, 0], torch.stack([mixing.kept("2.weight", s) for s in range(2000)])[:, 0, :16])


@pytest.mark.parametrize("until", [2, 4, 5, 7])
def test_a_run_resumes_bit_for_bit(until):
    def ready():
        model = net()
        return model, *make(model)

    def spoil(model, schedule):
        # the pretrained weights are those of the state
        schedule._mixing.pretrained["0.weight"].add_(1)

    assert_resumes(ready, run, until, 8, spoil)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "*"}, "columns are mixed of weights of linear layers, got 0.bias"),
        ({"mix": 1.0}, r"must lie in \[0, 1\), got 1.0"),
    ],
)
def test_what_cannot_be_mixed_is_refused(options, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        make(model, **options)
    optimizer = sparseft.SparseSGD(model.parameters())
    with pytest.raises(ValueError, match=message):
        DPSMix(model, optimizer, stage_steps=1, **options)
    assert DPSMix(model, optimizer, stage_steps=1).stage == 1
