"""States of 8 bits an entry: what they lose is bounded, backends agree on every code, and training hardly notices."""

import math

import pytest
import torch
from optimizers import PLAIN, model_and_groups, train
from sklearn.datasets import load_digits

import sparseft
import sparseft.testing
from sparseft import low_bits, reference
from sparseft.optim import OPTIMIZERS

DEVICES = sparseft.testing.devices()
OCTAVES = {False: 15, True: 31}
both_kinds = pytest.mark.parametrize("squares", [False, True], ids=["signed", "squares"])


def spread(n, squares, seed=0):
    """Numbers of very different sizes, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * torch.exp(4 * torch.randn(n, generator=generator))
    return values.square() if squares else values


def random(n, seed=0):
    return torch.randint(0, 2**32, (n,), generator=torch.Generator().manual_seed(seed))


@both_kinds
@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_the_error_is_bounded(squares, n):
    """Half a step to the nearest, a step at random: an eighth of the number, down to 2^-octaves of the largest."""
    values = spread(n, squares)
    largest = torch.stack([block.abs().max() for block in values.split(256)])
    smallest_step = largest.repeat_interleave(256)[:n] * 2.0 ** -(OCTAVES[squares] + 3)
    for share, bits in ((0.5, 1 << 19), (1.0, random(n))):
        codes, scales = low_bits.encode(values, squares, bits)
        assert torch.equal(scales, largest)
        error = (low_bits.decode(codes, scales, squares) - values).abs()
        # a mean of squares that is not 0 is never less than a step
        floor = smallest_step if squares else share * smallest_step
        assert (error <= 1.001 * (share * values.abs() / 8 + floor)).all()


def test_a_mean_of_squares_never_becomes_0_and_its_root_spans_a_hundred_thousand():
    values = torch.tensor([1.0, 1e-10, 1e-38, 0.0])
    decoded = low_bits.decode(*low_bits.encode(values, True), True).sqrt()
    assert decoded[3] == 0
    assert (decoded[:3] > 0).all()
    torch.testing.assert_close(decoded[:2], values[:2].sqrt(), rtol=0.1, atol=0)


@both_kinds
def test_the_mean_of_random_codes_is_right(squares):
    """One number, 200,000 times, beside the largest of its block."""
    for value in (0.9, 0.011, 3e-4, -0.2):
        values = torch.full((200_192,), abs(value) if squares else value)
        values[::256] = 1
        codes, scales = low_bits.encode(values, squares, random(len(values)))
        errors = (low_bits.decode(codes, scales, squares) - values).view(-1, 256)[:, 1:].double()
        assert errors.mean().abs() < 5 * errors.std() / math.sqrt(errors.numel()) + 1e-7


@both_kinds
def test_codes_of_what_codes_hold_are_the_same(squares):
    values = spread(3000, squares)
    codes, scales = low_bits.encode(values, squares, random(3000))
    assert torch.equal(low_bits.encode(low_bits.decode(codes, scales, squares), squares)[0], codes)


@both_kinds
def test_a_block_of_zeros_and_one_of_tiny_numbers(squares):
    values = torch.cat([torch.zeros(256), torch.full((256,), 1e-42), torch.ones(3)])
    codes, scales = low_bits.encode(values, squares)
    torch.testing.assert_close(low_bits.decode(codes, scales, squares), values, rtol=1e-3, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(device, bad):
    """A NaN must not turn into a number that looks sound."""
    for function in [reference.sgd_, *sparseft.testing.implementations("sgd_", device).values()]:
        codes, scales = step_once("sgd_", function, torch.tensor([1.0, bad, 2.0]), device)
        assert not low_bits.decode(codes[0], scales[0], False)[1].isfinite()


def step_once(op, function, grad, device, start=0.0):
    """The first step, from states of 0, of an optimizer whose states then are the gradient, and its square."""
    k = grad.numel()
    names = 2 if op == "adamw_" else 1
    states = [[torch.zeros(k, dtype=torch.uint8, device=device)] for _ in range(names)]
    scales = torch.zeros(names, low_bits.code_blocks(k), device=device)
    weight, index = torch.zeros(2 * k, device=device), torch.arange(1, 2 * k, 2, dtype=torch.int32, device=device)
    options = {"sgd_": {"momentum": 0.9, "dampening": 0.0}, "lion_": {"beta1": 0.9, "beta2": 0.0}}
    options["adamw_"] = {"beta1": 0.0, "beta2": 0.0, "eps": 1e-8}
    step, none = torch.tensor(start, device=device), torch.zeros(0, device=device)
    lists = [weight], [grad.to(device)], [index], *states, [none], [step]
    function(*lists, **options[op], lr=0.1, weight_decay=0.0, seeds=[7], scales=[scales])
    return [codes for (codes,) in states], scales


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["adamw_", "lion_", "sgd_"])
@pytest.mark.parametrize("k", [1, 256, 1300, 5000])
def test_every_implementation_makes_the_same_codes(op, device, k):
    """Gradients have few digits, so that their squares are exact and only codes could differ."""
    grad = spread(k, False).bfloat16().float()
    wanted, wanted_scales = step_once(op, getattr(reference, op), grad, device)
    for function in sparseft.testing.implementations(op, device).values():
        codes, scales = step_once(op, function, grad, device)
        assert torch.equal(scales, wanted_scales)
        for one, other in zip(codes, wanted, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", PLAIN)
def test_both_moments_take_little_more_than_two_bytes_an_entry(name):
    weight = torch.nn.Parameter(torch.randn(100_000))
    optimizer = OPTIMIZERS[name]([{"params": [weight], "indices": [torch.arange(0, 100_000, 9)]}], state_bits=8)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = {key: value for key, value in optimizer.state[weight].items() if key != "step"}
    entries = len(range(0, 100_000, 9))
    assert sum(value.nbytes for value in state.values()) <= 1.05 * len(state.keys() - {"scales"}) * entries


def test_without_momentum_there_is_nothing_to_keep():
    weight = torch.nn.Parameter(torch.ones(5))
    optimizer = sparseft.SparseSGD([weight], lr=0.5, state_bits=8)
    weight.grad = torch.ones(5)
    optimizer.step()
    assert set(optimizer.state[weight]) == {"step"}
    assert weight.tolist() == [0.5] * 5


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("first", [8, 32])
def test_the_number_of_bits_can_change_while_training(name, first):
    model, groups = model_and_groups()
    optimizer = OPTIMIZERS[name](groups, **PLAIN[name], state_bits=first)
    train(model, optimizer, 3)
    before = [dict(state) for state in optimizer.state.values()]
    optimizer.param_groups[0]["state_bits"] = 40 - first
    for parameter in model.parameters():
        parameter.grad = None
    next(iter(model.parameters())).grad = torch.zeros_like(next(iter(model.parameters())))
    optimizer.step()
    after = optimizer.state[next(iter(model.parameters()))]
    assert ("scales" in after) == (first == 32)
    assert before[0].keys() ^ after.keys() == {"scales"}


@pytest.fixture
def one_thread():
    """Keep tiny products on one thread: on a busy machine, waiting for a second one takes longer than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits_loss(name, **options):
    """Mean loss over the last epoch, of six, of a net of which a tenth of the weights trains on handwritten digits."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    mask = sparseft.select("random", model, density=0.1, seed=0, progress=False)
    rate = {"adamw": 0.01, "lion": 0.01, "sgd": 0.3}[name]
    rule = {**PLAIN[name], "lr": rate, "weight_decay": 0.0}
    optimizer = OPTIMIZERS[name](mask.param_groups(model), **rule, **options)
    losses = []
    for epoch in range(6):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses[-29:]) / 29


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PLAIN)
def test_training_converges_as_with_states_in_fp32(name):
    start = math.log(10)
    exact, coded = digits_loss(name), digits_loss(name, state_bits=8)
    assert exact < start / 5
    assert abs(coded - exact) < 0.05 * exact + 0.005


def test_scales_that_do_not_fit_change_nothing():
    for function in sparseft.testing.implementations("lion_", "cpu").values():
        for k, seeds, error in ((1, [1], "scales"), (2, None, "seeds"), (None, [1], "uint8|float32")):
            weight, codes, step = torch.ones(300), torch.zeros(300, dtype=torch.uint8), torch.tensor(0.0)
            lists = [weight], [weight.clone()], [torch.arange(300)], [codes], [torch.zeros(0)], [step]
            scales = None if k is None else [torch.zeros(1, k)]
            options = {"beta1": 0.9, "beta2": 0.99, "lr": 0.1, "weight_decay": 0.1, "seeds": seeds, "scales": scales}
            with pytest.raises((ValueError, TypeError, RuntimeError), match=error):
                function(*lists, **options)
            assert (weight == 1).all()
            assert step == 0


@pytest.mark.parametrize("bits", [0, 16, "8"])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match="state_bits must be one of 8, 32"):
        sparseft.SparseAdamW([torch.nn.Parameter(torch.randn(3))], state_bits=bits)


@pytest.mark.usefixtures("one_thread")
def test_a_mean_of_squares_follows_gradients_up_and_down():
    """Over thousands of steps of a thousandth each; rounded to the nearest, it would not leave where it is."""
    weight = torch.nn.Parameter(torch.zeros(2560))
    optimizer = sparseft.SparseAdamW([weight], lr=0.0, state_bits=8)
    generator, exact = torch.Generator().manual_seed(0), torch.zeros(2560)
    # one of each block is large, so that the scale does not follow the others
    sizes = torch.ones(2560)
    sizes[::256] = 100
    # random steps scatter it by a quarter, and by more while it falls to a hundredth
    for size, scatter in ((1.0, 0.3), (0.1, 0.65), (0.5, 0.3)):
        sizes[torch.arange(2560) % 256 != 0] = size
        for _ in range(3000):
            weight.grad = sizes * torch.randn(2560, generator=generator)
            exact = 0.999 * exact + 0.001 * weight.grad**2
            optimizer.step()
        state = optimizer.state[weight]
        ratio = (low_bits.decode(state["exp_avg_sq"], state["scales"][1], True) / exact).view(10, 256)[:, 1:]
        assert abs(float(ratio.mean()) - 1) < 0.05
        assert float(ratio.std()) < scatter
