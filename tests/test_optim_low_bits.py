"""What is kept in fewer bits than fp32: 16-bit weights without a master, rounded stochastically."""

import math

import pytest
import torch
from optimizers import assert_same, model_and_groups, train, weights

import sparseft
import sparseft.testing
from sparseft import low_bits

DEVICES = sparseft.testing.devices()
STEPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # between the numbers just below 1


def sgd_step(function, weight, grad, index, step, lr=1.0, seed=3, masters=None):
    """One plain SGD step, weights rounded stochastically; return the weights."""
    weight, none = weight.clone(), torch.empty(0, device=weight.device)
    masters, steps = [none if masters is None else masters], [torch.tensor(float(step), device=weight.device)]
    options = {"momentum": 0.0, "dampening": 0.0, "lr": lr, "weight_decay": 0.0, "seeds": [seed]}
    function([weight], [grad], [index], [none], masters, steps, **options)
    return weight


def functions(device):
    return [sparseft.reference.sgd_, *sparseft.testing.implementations("sgd_", device).values()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", STEPS, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_every_implementation_rounds_to_the_same_bits(device, dtype, index_dtype):
    """Weights are differences of numbers that fp32 holds exactly, so that only the random bits could differ."""
    generator = torch.Generator().manual_seed(0)
    scale = 2.0 ** torch.randint(-30, 8, (5000,), generator=generator)
    weight = (torch.randint(-128, 128, (5000,), generator=generator) * scale).to(dtype).to(device)
    grad = (torch.randint(-128, 128, (5000,), generator=generator) * scale * 2.0**-7).to(device)
    index = torch.arange(1, 5000, 2, dtype=index_dtype, device=device)
    for step in (0, 1, 70_000):
        wanted, *others = (sgd_step(function, weight, grad, index, step) for function in functions(device))
        assert not torch.equal(wanted, sgd_step(functions(device)[0], weight, grad, index, step + 1))
        assert not torch.equal(wanted, sgd_step(functions(device)[0], weight, grad, index, step, seed=4))
        for other in others:
            assert torch.equal(wanted.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize("dtype", STEPS, ids=str)
@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("size", [1.0, -1.0, 2.0**-13, 2.0**-17], ids=str)
def test_the_mean_is_right(dtype, share, size):
    """A share of the step between two neighbours moves that share of the weights; also fp16 below its normal ones."""
    spacing = abs(size) * STEPS[dtype]
    if dtype == torch.float16:
        spacing = max(spacing, 2.0**-24)
    n = 200_000
    weight, grad = torch.full((n,), size, dtype=dtype), torch.full((n,), math.copysign(share * spacing, size))
    index = torch.arange(n, dtype=torch.int32)
    moved = sgd_step(torch.ops.sparseft.sgd_, weight, grad, index, 0).double()
    assert set(((size - moved) / math.copysign(spacing, size)).tolist()) == {0.0, 1.0}
    error = float((size - moved).abs().mean() / spacing) - share
    assert abs(error) < 5 * math.sqrt(share * (1 - share) / n) + 2.0**-13


def test_random_numbers_are_fair_and_not_those_of_neighbours():
    """Every bit is set half of the time, and is no bit of the next position, step or seed."""
    positions = torch.arange(100_000)
    streams = [
        low_bits.random_bits(seed, step, at)
        for seed, step, at in [
            (0, 1, positions),
            (0, 1, positions + 1),
            (0, 2, positions),
            (1, 1, positions),
            (0, 1, positions + 2**32),
        ]
    ]
    bits = [(stream[:, None] >> torch.arange(32) & 1).double() - 0.5 for stream in streams]
    for stream in bits:
        assert stream.mean(0).abs().max() < 5 * 0.5 / math.sqrt(len(positions))
    for other in bits[1:]:
        assert (bits[0].T @ other / len(positions)).abs().max() < 6 * 0.25 / math.sqrt(len(positions))


@pytest.mark.parametrize("dtype", STEPS, ids=str)
def test_numbers_without_neighbours_stay_what_they_are(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-24, 1.0, 1.0, 1.0], dtype=dtype)
    grads = torch.tensor([0.0] * 5 + [float("inf"), float("-inf"), float("nan")])
    for function in functions("cpu"):
        after = sgd_step(function, values, grads, torch.arange(8), 0)
        assert torch.equal(after[:5].view(torch.int16), values[:5].view(torch.int16))
        assert str(after[5:].tolist()) == "[-inf, inf, nan]"


def test_a_master_is_rounded_to_the_nearest():
    weight, masters = torch.ones(1000, dtype=torch.bfloat16), torch.full((1000,), 1.001)
    after = sgd_step(torch.ops.sparseft.sgd_, weight, torch.zeros(1000), torch.arange(1000), 0, masters=masters)
    assert (after == 1).all()


def test_the_number_of_threads_changes_nothing():
    n, before = 100_000, torch.get_num_threads()
    weight, grad = torch.ones(n, dtype=torch.bfloat16), torch.full((n,), 0.001)
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(sgd_step(torch.ops.sparseft.sgd_, weight, grad, torch.arange(n), 0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", STEPS, ids=str)
def test_training_that_stalls_in_16_bits_goes_on(device, dtype):
    """Steps of a fifth of the last digit: lost by torch, taken with a master and, in the mean, without one."""
    target = torch.linspace(0.9, 1.0, 400, device=device)
    plain = torch.nn.Parameter(torch.ones(400, device=device, dtype=dtype))
    ours = {rounding: torch.nn.Parameter(plain.detach().clone()) for rounding in ("master", "stochastic")}
    options = {"lr": 2 * STEPS[dtype], "momentum": 0.0}
    optimizers = [torch.optim.SGD([plain], **options)]
    optimizers += [sparseft.SparseSGD([weight], **options, rounding=rounding) for rounding, weight in ours.items()]
    for _ in range(round(5 / options["lr"])):
        for weight in (plain, *ours.values()):
            weight.grad = (weight.detach().float() - target).to(dtype)
        for optimizer in optimizers:
            optimizer.step()
    errors = {rounding: (weight.detach() - target).abs().mean() for rounding, weight in ours.items()}
    assert torch.equal(plain.detach(), torch.ones_like(plain))
    assert errors["master"] < 2 * STEPS[dtype]
    assert errors["stochastic"] < 2 * STEPS[dtype]


def test_parameters_do_not_share_their_random_numbers():
    pair = [torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = sparseft.SparseSGD([{"params": pair[:2]}, {"params": pair[2:]}], lr=1.0, rounding="stochastic")
    for parameter in pair:
        parameter.grad = torch.full_like(parameter, 0.002)
    optimizer.step()
    assert not any(torch.equal(pair[i], pair[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_no_master_is_kept():
    model, groups = model_and_groups(torch.bfloat16)
    optimizer = sparseft.SparseSGD(groups, lr=0.1, rounding="stochastic")
    train(model, optimizer, 2)
    assert all(set(state) == {"step"} for state in optimizer.state.values())


def test_another_seed_is_another_run():
    runs = []
    for seed in (0, 0, 1):
        model, groups = model_and_groups(torch.bfloat16)
        train(model, sparseft.SparseSGD(groups, lr=0.01, rounding="stochastic", seed=seed), 5)
        runs.append(weights(model))
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_seeds_that_do_not_fit_are_refused():
    parameter = torch.nn.Parameter(torch.randn(10))
    for seed in (-1, 2**63, 0.5, None):
        with pytest.raises(ValueError, match="seed must be an integer"):
            sparseft.SparseSGD([parameter], seed=seed)
    for function in functions("cpu")[1:]:
        weight, none = torch.ones(3), torch.empty(0)
        options = {"momentum": 0.0, "dampening": 0.0, "lr": 1.0, "weight_decay": 0.0, "seeds": [1, 2]}
        with pytest.raises((ValueError, RuntimeError), match="seeds must hold one number for each of the 1"):
            function([weight], [weight], [torch.arange(3)], [none], [none], [torch.tensor(0.0)], **options)
