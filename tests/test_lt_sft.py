"""LT-SFT against the two runs of torch's own optimizer that it stands for."""

import pytest
import torch
from resuming import assert_resumes
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


def ready(dtype=torch.float32, **options):
    model = net(dtype)
    return model, *make(model, **options)


def forget(model, schedule):
    """Ruin what the state has to bring."""
    for weight in schedule._start.values():
        weight.zero_()


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


@pytest.mark.parametrize("rounds", [2, 4])
def test_several_rounds_are_runs_of_dense_optimizers_with_growing_masks(rounds):
    model, other = net(), net()
    optimizer, schedule = make(model, 0.1, rounds=rounds, sparse_steps=3, dense="2.bias")
    base = {name: p.detach().clone() for name, p in other.named_parameters()}
    names = ["0.weight", "0.bias", "2.weight"]
    n = sum(base[name].numel() for name in names)
    k, step = n // 10, 0
    assert k % rounds
    chosen = torch.zeros(n, dtype=torch.bool)

    def adamw():
        return torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)

    for its_round in range(rounds):
        assert (schedule.round, schedule.chosen) == (its_round, False)
        start = {name: p.detach().clone() for name, p in other.named_parameters()}
        run(other, adamw(), range(step, step + FULL))
        change = torch.cat([(other.get_parameter(name).detach() - start[name]).abs().flatten() for name in names])
        change[chosen] = -1
        more = k * (its_round + 1) // rounds - int(chosen.sum())
        chosen[change.argsort(descending=True, stable=True)[:more]] = True
        masks = {"2.bias": torch.ones(4)}
        masks |= {
            name: part.view_as(base[name]).float()
            for name, part in zip(names, chosen.split([base[name].numel() for name in names]), strict=True)
        }
        other.load_state_dict(start)
        run(model, optimizer, range(step, step + FULL))
        assert schedule.chosen
        assert not optimizer.state
        assert schedule.mask.k == int(chosen.sum())
        for name in names:
            mine = schedule.mask[name].long() if name in schedule.mask else torch.empty(0, dtype=torch.int64)
            assert torch.equal(mine, masks[name].flatten().nonzero().flatten()), (its_round, name)

        def only_the_mask(masks=masks):
            for name, parameter in other.named_parameters():
                parameter.grad *= masks[name]

        # the last phase has no end
        last = 3 if its_round < rounds - 1 else 9
        run(other, adamw(), range(step + FULL, step + FULL + last), only_the_mask)
        run(model, optimizer, range(step + FULL, step + FULL + last))
        step += FULL + last
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight, other.get_parameter(name), rtol=1e-4, atol=2e-5, msg=name)
            if name in names:
                assert torch.equal(weight[masks[name] == 0], base[name][masks[name] == 0]), name
    assert schedule.mask.k == k
    assert schedule.chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("until", [2, 4, 6])
def test_a_run_resumes_bit_for_bit(until, dtype):
    assert_resumes(lambda: ready(dtype), run, until, 4, forget)


@pytest.mark.parametrize("until", [2, 4, 6, 7, 9, 11, 15])
def test_a_run_of_several_rounds_resumes_bit_for_bit(until):
    assert_resumes(lambda: ready(rounds=2, sparse_steps=3), run, until, 9, forget)


def test_weights_that_do_not_change_are_no_choice_and_nothing_is_rewound():
    model = net()
    optimizer = sparseft.SparseSGD(model.parameters(), lr=0.0)
    schedule = LTSFT(model, optimizer, 0.1, 1)
    with pytest.raises(ValueError, match="zero"):
        run(model, optimizer, [0])
    assert not schedule.chosen
    assert schedule.mask.k == schedule.mask.n


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "for at least one step before the choice, got 0"),
        ({"rounds": 0}, "there must be at least one round, got 0"),
        ({"rounds": 2}, "give them for several rounds and for no single one, got None for 2"),
        ({"sparse_steps": 5}, "give them for several rounds and for no single one, got 5 for 1"),
        ({"rounds": 2, "sparse_steps": 0}, "must train for at least one step in each round, got 0"),
        ({"rounds": 2, "sparse_steps": 5, "scope": "tensor"}, "rank all entries together, got the scope 'tensor'"),
        ({"rounds": 5, "sparse_steps": 5, "density": 0.005}, "an entry to choose, got 5 rounds for 3 of 634 entries"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    model = net()
    optimizer = sparseft.SparseSGD(model.parameters())
    with pytest.raises(ValueError, match=message):
        LTSFT(model, optimizer, **{"density": 0.1, "steps": 4, **options})


@pytest.mark.parametrize(
    "options", [{"steps": 2.5}, {"rounds": 2.0, "sparse_steps": 3}, {"rounds": 2, "sparse_steps": 1.5}]
)
def test_numbers_are_whole(options):
    model = net()
    with pytest.raises(TypeError, match="must be a whole number, got"):
        LTSFT(model, sparseft.SparseSGD(model.parameters()), **{"density": 0.1, "steps": 4, **options})


def in_two_groups():
    model = net()
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    weights = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
    optimizer = sparseft.SparseAdamW([{"params": biases, "lr": 1e-1}, {"params": weights}], lr=1e-2)
    return model, optimizer, LTSFT(model, optimizer, 0.01, FULL, rounds=2, sparse_steps=2)


@pytest.mark.parametrize("until", [FULL + 1, FULL + 2, FULL + 3])
def test_what_a_round_does_not_choose_keeps_its_group_in_the_next_one(until):
    model, optimizer, _ = in_two_groups()
    begun = [{id(parameter) for parameter in group["params"]} for group in optimizer.param_groups]
    run(model, optimizer, range(FULL))
    held = [{id(parameter) for parameter in group["params"]} for group in optimizer.param_groups]
    assert held != begun
    run(model, optimizer, range(FULL, FULL + 2))
    held = [{id(parameter) for parameter in group["params"]} for group in optimizer.param_groups]
    assert held == begun
    assert_resumes(in_two_groups, run, until, 6)
