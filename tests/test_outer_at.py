"""outer_at beyond its sample inputs: many blocks of tokens and threads, autograd as the oracle, bad input."""

import pytest
import torch

from sparseft import kernels, testing

sparse = torch.ops.sparseft
LAUNCHERS = [sparse.outer_at, kernels.outer_at]


def sample_of(generator, dtype, samples, tokens, a, b, k):
    left, right = (torch.randn(samples, tokens, features, generator=generator).to(dtype) for features in (a, b))
    return testing.Sample("large", (left, right, testing.random_indices(a * b, k, generator)))


def test_entries_are_those_of_the_gradient_that_autograd_finds(generator):
    x, cotangent = torch.randn(3, 7, 5, generator=generator), torch.randn(3, 7, 4, generator=generator)
    weight = torch.randn(4, 5, generator=generator, requires_grad=True)
    indices = torch.tensor([0, 3, 4, 9, 10, 19], dtype=torch.int32)
    for n in range(3):
        (grad,) = torch.autograd.grad((torch.nn.functional.linear(x[n], weight) * cotangent[n]).sum(), weight)
        for outer_at in LAUNCHERS:
            torch.testing.assert_close(outer_at(cotangent, x, indices)[n], grad.flatten()[indices])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1000, 300, 40, 3000), (2, 257, 40, 300, 3000), (7, 20, 90, 90, 8100), (300, 1, 50, 70, 400)]
)
def test_over_many_blocks_and_threads(generator, dtype, shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        testing.assert_matches_reference("outer_at", sparse.outer_at, sample_of(generator, dtype, *shape))
    finally:
        torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads(generator):
    arguments = sample_of(generator, torch.float32, 1, 600, 200, 100, 5000).args
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(sparse.outer_at(*arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (0, torch.zeros(2, 3, 4, dtype=torch.float64), "left must be float32 or bfloat16 or float16, got float64"),
        (0, torch.zeros(3, 4), r"left must be \[samples, tokens, features\], got 2"),
        (1, torch.zeros(2, 4, 5), "right must have the samples and tokens of left, 2 and 3, got 2 and 4"),
        (1, torch.zeros(2, 3, 5).half(), "right must have the dtype of left, float32, got float16"),
        (2, torch.tensor([0.0]), "indices must be int32 or int64, got float32"),
        (2, torch.tensor([3, 1]), "indices must be sorted and unique"),
        (2, torch.tensor([1, 1]), "indices must be sorted and unique"),
        (2, torch.tensor([[1, 2]]), "indices must be one list"),
        (2, torch.tensor([0, 20]), "indices must be from 0 to 19, .*got 0 to 20"),
        (2, torch.tensor([-1, 2]), "indices must be from 0 to 19, .*got -1 to 2"),
    ],
)
def test_bad_arguments_are_named(position, bad, message):
    arguments = [torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.tensor([0, 1])]
    arguments[position] = bad
    with pytest.raises(ValueError, match=message):
        sparse.outer_at(*arguments)


def test_the_triton_launcher_checks_too():
    left, right, indices = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.tensor([0, 1])
    with pytest.raises(TypeError, match="both be fp32, bf16 or fp16"):
        kernels.outer_at(left, right.half(), indices)
    with pytest.raises(ValueError, match=r"\[N, T, A\] and \[N, T, B\]"):
        kernels.outer_at(left, right[:1], indices)
    with pytest.raises(TypeError, match="indices must be int32 or int64"):
        kernels.outer_at(left, right, indices.float())
