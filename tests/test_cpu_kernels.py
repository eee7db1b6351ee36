"""What the compiled CPU ops hold beyond small samples: several pieces, tiles and threads, odd dtypes, bad input."""

import shutil
import subprocess

import pytest
import torch

from sparseft import ops, reference, testing

_C = pytest.importorskip("sparseft._C", reason="the C++ extension is not built")
sparse = torch.ops.sparseft
pytestmark = pytest.mark.usefixtures("threads")
ADAMW = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def adamw_sample(generator, dtype, grad_dtype):
    params = [torch.randn(n, generator=generator).to(dtype) for n in (90_000, 17, 40_000)]
    indices = [testing.random_indices(p.numel(), k, generator) for p, k in zip(params, (30_001, 17, 999), strict=True)]
    grads = [torch.randn(p.numel(), generator=generator).to(grad_dtype) for p in params]
    exp_avgs = [torch.randn(i.numel(), generator=generator) for i in indices]
    exp_avg_sqs = [torch.rand(i.numel(), generator=generator) for i in indices]
    masters = [torch.empty(0) for _ in params]
    if dtype != torch.float32:
        masters = [p[i.long()].float() for p, i in zip(params, indices, strict=True)]
        masters[0][::5] += 10  # as if the weight had been changed from outside
    steps = [torch.tensor(float(step)) for step in (0, 4, 99)]
    return testing.Sample("large", (params, grads, indices, exp_avgs, exp_avg_sqs, masters, steps), ADAMW)


def test_the_extension_uses_only_the_stable_abi():
    if not shutil.which("nm"):
        pytest.skip("nm is not installed: the symbols were not read")
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", _C.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    assert any("torch_library_impl" in symbol for symbol in symbols)
    assert [symbol for symbol in symbols if any(name in symbol for name in ("c10::", "at::", "torch::"))] == []


def test_what_it_says_it_holds_is_registered():
    for device, names in _C.build_info()["ops"].items():
        for name in names:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparseft::{name}", device.upper()), name
    assert set(_C.build_info()["ops"]["cpu"]) == set(ops.SCHEMAS)


@pytest.mark.parametrize("grad_dtype", testing.DTYPES)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_adamw_over_many_blocks(generator, dtype, grad_dtype):
    testing.assert_matches_reference("adamw_", sparse.adamw_, adamw_sample(generator, dtype, grad_dtype))


@pytest.mark.parametrize("op", ["adamw_", "fisher_linear_", "fisher_linears_", "fisher_segments_"])
def test_results_do_not_depend_on_the_number_of_threads(generator, op):
    if op == "adamw_":
        sample = adamw_sample(generator, torch.bfloat16, torch.float16)
    elif op == "fisher_segments_":
        x, dy = (torch.randn(132, features, generator=generator) for features in (230, 200))
        offsets, groups = torch.tensor([0, 40, 41, 90, 90, 132]), torch.tensor([1, 0, 0, 2, 1])
        sample = testing.Sample("large", (torch.zeros(3, 200, 230), x, dy, offsets, groups))
    else:
        x, dy = (torch.randn(4, 33, features, generator=generator) for features in (530, 500))
        few, small = torch.randn(2, 4, 1, 30, generator=generator)
        layers = ((torch.zeros(500, 530), x, dy), (torch.zeros(30, 30), few, small))
        lists = tuple(list(tensors) for tensors in zip(*layers, strict=True))
        sample = testing.Sample("large", lists if op == "fisher_linears_" else layers[0])
    many = testing.observe(op, getattr(sparse, op), sample)
    torch.set_num_threads(2)
    two = testing.observe(op, getattr(sparse, op), sample)
    assert all(torch.equal(a, b) for a, b in zip(many, two, strict=True))


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize(
    ("samples", "tokens", "i", "o"), [(4, 33, 384, 400), (2, 40, 1100, 70), (2, 60, 3, 900), (600, 1, 300, 520)]
)
def test_fisher_over_many_tiles(generator, dtype, samples, tokens, i, o):
    x, dy = (torch.randn(samples, tokens, features, generator=generator).to(dtype) for features in (i, o))
    weight = torch.rand(samples, generator=generator)
    sample = testing.Sample("large", (torch.rand(o, i, generator=generator), x, dy, weight))
    testing.assert_matches_reference("fisher_linear_", sparse.fisher_linear_, sample)


@pytest.mark.parametrize("dtype", [*testing.DTYPES, "mixed"])
def test_topk_over_many_pieces(generator, dtype):
    scores = [torch.randn(n, generator=generator) for n in (150_001, 5, 70_000, 0, 33_333)]
    scores.append(torch.randint(-4, 5, (100_000,), generator=generator).float())
    kinds = testing.DTYPES * 2 if dtype == "mixed" else [dtype] * len(scores)
    scores = [score.to(kind) for score, kind in zip(scores, kinds, strict=True)]
    total = sum(score.numel() for score in scores)
    # among few distinct scores most thresholds are ties; among many, the last digit decides
    for k in (0, 1, 1000, 7001, 50_000, 200_000, total - 1, total):
        for got, want in zip(sparse.topk_indices(scores, k), reference.topk_indices(scores, k), strict=True):
            assert torch.equal(got, want), k


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.complex128], ids=str
)
def test_entries_of_every_size_are_moved_bit_for_bit(generator, dtype):
    param = (torch.randn(200_000, generator=generator) * 9).to(dtype)
    values = (torch.randn(50_001, generator=generator) * 9).to(dtype)
    index = testing.random_indices(param.numel(), values.numel(), generator)
    old, new = param.clone(), values.clone()
    assert torch.equal(sparse.gather([param], [index.long()])[0], old[index.long()])
    sparse.delta_swap_([param], [index], [values])
    assert torch.equal(values, old[index.long()])
    assert torch.equal(param[index.long()], new)
    sparse.delta_swap_([param], [index.long()], [values])
    assert torch.equal(param, old)
    assert torch.equal(values, new)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([1, 40], r"indices\[1\] must be from 0 to 39, inside params\[1\], got 1 to 40"),
        ([-1, 3], r"indices\[1\] must be from 0 to 39, inside params\[1\], got -1 to 3"),
        ([5, 1], r"indices\[1\] must be sorted and unique, got 1 after 5"),
        ([5, 5], r"indices\[1\] must be sorted and unique, got 5 after 5"),
    ],
)
def test_bad_indices_change_nothing(index, message):
    params, values = [torch.zeros(40), torch.zeros(40)], [torch.ones(2), torch.ones(2)]
    with pytest.raises(ValueError, match=message):
        sparse.delta_swap_(params, [torch.tensor([0, 1]), torch.tensor(index)], values)
    assert not any(param.any() for param in params)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("place", [1, 1023, 1024, 1025, 19_999, 29_999])
@pytest.mark.parametrize("op", ["adamw_", "delta_swap_", "gather"])
def test_one_bad_index_anywhere_in_a_long_list_is_found_before_the_first_write(op, place, dtype):
    params, indices = [torch.zeros(40_000), torch.zeros(40_000)], [torch.arange(30_000, dtype=dtype) for _ in range(2)]
    indices[1][place] = indices[1][place - 1]
    values, steps = [torch.ones(30_000), torch.ones(30_000)], [torch.tensor(4.0), torch.tensor(4.0)]
    arguments = {
        "adamw_": (params, values, indices, values, values, [torch.empty(0)] * 2, steps),
        "delta_swap_": (params, indices, values),
        "gather": (params, indices),
    }
    message = rf"{op}: indices\[1\] must be sorted .*, got {place - 1} after {place - 1} at {place};"
    with pytest.raises(ValueError, match=message):
        getattr(sparse, op)(*arguments[op], **(ADAMW if op == "adamw_" else {}))
    assert not any(param.any() for param in params)
    assert all((value == 1).all() for value in values)
    assert steps == [4, 4]


@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (0, torch.zeros(4, 10).T, r"params\[0\] must be contiguous"),
        (0, torch.zeros(40, dtype=torch.float64), r"params\[0\] must be float32 or bfloat16 or float16, got float64"),
        (1, torch.zeros(7), r"grads\[0\] must have the 40 elements .* or the 2 of its indices, got 7"),
        (2, torch.tensor([0.0, 1.0]), r"indices\[0\] must be int32 or int64 or int16, got float32"),
        (3, torch.zeros(3), r"exp_avgs\[0\] must have 2 elements, .*got 3"),
        (4, torch.zeros(2).half(), r"exp_avg_sqs\[0\] must be float32, got float16"),
        (6, torch.tensor(1), r"steps\[0\] must be float32, got int64"),
    ],
)
def test_bad_optimizer_arguments_are_named_and_change_nothing(position, bad, message):
    param = torch.zeros(40)
    arguments = [param, torch.ones(40), torch.tensor([0, 1]), torch.zeros(2), torch.zeros(2), torch.empty(0)]
    arguments.append(torch.tensor(1.0))
    arguments[position] = bad
    with pytest.raises(ValueError, match=message):
        sparse.adamw_(*([argument] for argument in arguments), **ADAMW)
    assert not param.any()


def test_non_finite_scores_are_located():
    scores = [torch.rand(100), torch.rand(70_000)]
    scores[1][[3, 69_999]] = torch.tensor([float("nan"), float("-inf")])
    with pytest.raises(ValueError, match=r"scores\[1\] must be finite, got 2 NaN or infinite values"):
        sparse.topk_indices(scores, 10)
