"""LT-SFT against the two runs of torch's own optimizer that it stands for."""

import io

import pytest
import torch
from torch import nn

import sparseft
from sparseft.schedules import LTSFT

FULL = 4


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 4)).to(dtype)


def run(model, optimizer, steps, after_backward=None):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator)
        nn.functional.cross_entropy(model(x.to(next(model.parameters()))).float(), y).backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        optimizer.zero_grad()


def make(model, density=0.1, **options):
    optimizer = sparseft.SparseAdamW(model.parameters(), lr=1e-2)
    return optimizer, LTSFT(model, optimizer, density, FULL, **options)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_it_is_two_runs_of_a_dense_optimizer_the_second_with_a_mask(scope):
    model, first, second = net(), net(), net()
    optimizer, schedule = make(model, 0.25, dense="2.bias", scope=scope)
    run(first, torch.optim.AdamW(first.parameters(), lr=1e-2, weight_decay=0.0), range(FULL))
    change = {name: (p - second.get_parameter(name)).detach().abs() for name, p in first.named_parameters()}
    masks = {"2.bias": torch.ones(4)}
    names = ["0.weight", "0.bias", "2.weight"]
    if scope == "global":
        every = torch.cat([change[name].flatten() for name in names])
        chosen = torch.zeros_like(every)
        chosen[every.argsort(descending=True, stable=True)[: len(every) // 4]] = 1
        parts = chosen.split([change[name].numel() for name in names])
        masks |= {name: part.view_as(change[name]) for name, part in zip(names, parts, strict=True)}
    else:
        for name, k in zip(names, (120, 7, 30), strict=True):
            order = change[name].flatten().argsort(descending=True, stable=True)
            masks[name] = torch.zeros(order.numel()).scatter(0, order[:k], 1.0).view_as(change[name])

    run(model, optimizer, range(FULL - 1))
    assert not schedule.chosen
    run(model, optimizer, [FULL - 1])
    assert schedule.chosen
    for name, weight in model.named_parameters():
        assert torch.equal(weight, second.get_parameter(name)), name
    assert not optimizer.state
    for name in names:
        assert torch.equal(schedule.mask[name].long(), masks[name].flatten().nonzero().flatten()), name

    def only_the_mask():
        for name, parameter in second.named_parameters():
            parameter.grad *= masks[name]

    # without decay, an entry whose gradients are all zero stays where it is
    run(second, torch.optim.AdamW(second.parameters(), lr=1e-2, weight_decay=0.0), range(10, 15), only_the_mask)
    run(model, optimizer, range(10, 15))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, second.get_parameter(name), rtol=1e-5, atol=1e-6, msg=name)


def test_the_delta_is_of_the_pretrained_model(tmp_path):
    model, base = net(), net()
    optimizer, schedule = make(model)
    run(model, optimizer, range(9))
    sparseft.save_delta(model, schedule.mask, tmp_path / "delta.safetensors")
    sparseft.load_delta(base, tmp_path / "delta.safetensors")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, base.get_parameter(name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("until", [2, 4, 6])
def test_a_run_resumes_bit_for_bit(until, dtype):
    model = net(dtype)
    optimizer, schedule = make(model)
    run(model, optimizer, range(until))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, schedule, optimizer)], file)
    file.seek(0)
    other = net(dtype)
    resumed, its = make(other)
    for part, state in zip((other, its, resumed), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for its_model, its_optimizer in ((model, optimizer), (other, resumed)):
        run(its_model, its_optimizer, range(until, until + 4))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name
    assert its.mask == schedule.mask


def test_weights_that_do_not_change_are_no_choice_and_nothing_is_rewound():
    model = net()
    optimizer = sparseft.SparseSGD(model.parameters(), lr=0.0)
    schedule = LTSFT(model, optimizer, 0.1, 1)
    with pytest.raises(ValueError, match="zero"):
        run(model, optimizer, [0])
    assert not schedule.chosen
    assert schedule.mask.k == schedule.mask.n


def test_no_steps_are_refused():
    model = net()
    optimizer = sparseft.SparseSGD(model.parameters())
    with pytest.raises(ValueError, match="for at least one step before the choice, got 0"):
        LTSFT(model, optimizer, 0.1, 0)
