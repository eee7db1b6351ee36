"""What the compiled fisher_linear_ and fisher_linears_ hold on the CPU: tiles, threads, padding, scores, bad input."""

import pytest
import torch

from sparseft import reference, testing

pytest.importorskip("sparseft._C", reason="the C++ extension is not built")
sparse = torch.ops.sparseft
pytestmark = pytest.mark.usefixtures("threads")


def padded_layer(generator, dtype, samples, tokens, i, o):
    """x and dy of samples of random lengths, padding on either side, in which x is infinite."""
    x, dy = (torch.randn(samples, tokens, features, generator=generator).to(dtype) for features in (i, o))
    for n in range(samples):
        first, end = torch.randint(0, tokens + 1, (2,), generator=generator).sort().values.tolist()
        for padding in (slice(0, first), slice(end, tokens)):
            x[n, padding], dy[n, padding] = float("inf"), 0
    return x, dy


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("samples", "tokens", "i", "o"), [(6, 33, 384, 400), (4, 60, 1100, 70), (3, 70, 3, 900), (600, 1, 300, 520)]
)
def test_padding_and_scores_over_many_tiles(generator, dtype, samples, tokens, i, o):
    x, dy = padded_layer(generator, dtype, samples, tokens, i, o)
    weight, scores = torch.rand(2, samples, generator=generator)
    fisher, selected = torch.rand(o, i, generator=generator), torch.rand(o, i, generator=generator) < 0.2
    for rest in ((), (None, scores), (weight, scores, selected)):
        sample = testing.Sample(f"{len(rest)} more arguments", (fisher, x, dy, *rest))
        testing.assert_matches_reference("fisher_linear_", sparse.fisher_linear_, sample)


def test_scores_are_the_sums_of_single_samples(generator):
    """Against autograd, a sample at a time; selected and unselected entries make up all."""
    x, dy = padded_layer(generator, torch.float32, 5, 21, 40, 30)
    selected = torch.rand(30, 40, generator=generator) < 0.5
    chosen, others, everything = torch.zeros(3, 5)
    for scores, mask in ((chosen, selected), (others, ~selected), (everything, None)):
        sparse.fisher_linear_(torch.zeros(30, 40), x, dy, None, scores, mask)
    torch.testing.assert_close(chosen + others, everything)
    for n in range(5):
        weight = torch.zeros(30, 40, requires_grad=True)
        (torch.nn.functional.linear(x[n].nan_to_num(posinf=0.0), weight) * dy[n]).sum().backward()
        torch.testing.assert_close(chosen[n], weight.grad[selected].square().sum())


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_padding_ends_at_the_first_row_with_anything_in_it(generator, dtype):
    """A smallest number or a NaN in the last feature, at any distance between features; -0.0 is zero."""
    smallest = torch.finfo(dtype).smallest_normal
    for value, place in ((smallest, 0), (float("nan"), 599), (-smallest, 599)):
        for stride in (1, 2):
            dy = torch.full((1, 9, 600 * stride), -0.0, dtype=dtype)[..., ::stride]
            dy[0, 4, place] = value
            x = torch.full((1, 9, 2), float("inf"), dtype=dtype)
            x[0, 4] = 1
            fisher = torch.zeros(600, 2)
            sparse.fisher_linear_(fisher, x, dy)
            wanted = torch.zeros(600, 2)
            wanted[place] = float(dy[0, 4, place]) ** 2
            torch.testing.assert_close(fisher, wanted, equal_nan=True, rtol=1e-6, atol=0)


def test_zeros_between_tokens_that_count_do_count(generator):
    x, dy = torch.ones(1, 3, 2), torch.ones(1, 3, 2)
    dy[0, 1], x[0, 1] = 0, float("inf")
    fisher = torch.zeros(2, 2)
    sparse.fisher_linear_(fisher, x, dy)
    assert fisher.isnan().all()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_layers_of_one_call_are_what_they_are_alone(generator, dtype):
    sizes = [(8, 40, 384, 384), (8, 40, 384, 900), (5, 1, 300, 520), (2, 3, 5, 7), (8, 40, 1, 1), (8, 40, 600, 64)]
    layers = [
        (torch.rand(o, i, generator=generator), *padded_layer(generator, dtype, n, t, i, o)) for n, t, i, o in sizes
    ]
    lists = tuple(list(tensors) for tensors in zip(*layers, strict=True))
    # of a layer with one entry plain PyTorch may by chance err by nothing
    testing.assert_matches_reference(
        "fisher_linears_", sparse.fisher_linears_, testing.Sample("layers", lists), ulps=4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(3)}, "scores must have 2 elements, one a sample, got 3"),
        ({"scores": torch.zeros(2).half()}, "scores must be float32, got float16"),
        ({"scores": torch.zeros(4)[::2]}, "scores must be contiguous"),
        ({"selected": torch.ones(4, 5) > 0}, "selected restricts scores, got no scores; pass them"),
        ({"scores": torch.zeros(2), "selected": torch.ones(4, 5)}, "selected must be bool, got float32"),
        ({"scores": torch.zeros(2), "selected": torch.ones(5, 4) > 0}, r"selected must have .* \[4, 5\]"),
        ({"dy": torch.ones(2, 3, 5)}, r"fisher must be \[features of dy, features of x\], \[5, 5\]"),
        ({"x": torch.ones(3, 5)}, "x must be .*, got 2 dimensions"),
    ],
)
def test_bad_arguments_change_nothing(change, message):
    arguments = {"fisher": torch.zeros(4, 5), "x": torch.ones(2, 3, 5), "dy": torch.ones(2, 3, 4)} | change
    with pytest.raises(ValueError, match=message):
        sparse.fisher_linear_(**arguments)
    assert not arguments["fisher"].any()


def test_bad_lists_change_nothing():
    fisher, x, dy = torch.zeros(4, 5), torch.ones(2, 3, 5), torch.ones(2, 3, 4)
    bad = [
        (([fisher], [x, x], [dy]), "xs must hold one tensor for each of the 1"),
        (([fisher, torch.zeros(4, 5)], [x, x[:, :, 1:]], [dy, dy]), r"fishers\[1\] must be"),
        (([fisher, fisher], [x, x], [dy, dy]), "must not share memory"),
    ]
    for lists, message in bad:
        with pytest.raises(ValueError, match=message):
            sparse.fisher_linears_(*lists)
    assert not fisher.any()


def test_the_reference_says_the_same_of_padding():
    x, dy = torch.ones(1, 4, 1), torch.zeros(1, 4, 1)
    dy[0, 1:3], x[0, 0], x[0, 3] = 1, float("nan"), float("inf")
    fisher = torch.zeros(1, 1)
    reference.fisher_linear_(fisher, x, dy)
    assert fisher.item() == 4
