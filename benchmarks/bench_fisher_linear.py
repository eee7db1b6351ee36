"""Squared per-sample gradients of a Linear weight, against the ordinary weight gradient: one matrix product.

Floor: that product's operations and one multiply-add a sample and weight; x, dy and the scores moved once. Samples
with padding, scores of samples, and many small layers are also set against the op's plain form.
"""

import harness
import pytest
import torch

from sparseft import reference, testing

# samples, tokens, in, out, dtype: the layers of MiniLM and of BERT-base; for a GPU those of a 7 B decoder
FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = {
    "cpu": [
        (16, 128, 384, 384, FP32),
        (16, 128, 384, 1536, FP32),
        (16, 128, 1536, 384, FP32),
        (16, 128, 768, 768, FP32),
        (16, 128, 768, 3072, FP32),
        (16, 128, 768, 3072, BF16),
    ],
    "cuda": [
        (16, 128, 768, 3072, BF16),
        (32, 64, 1024, 4096, BF16),
        (8, 1024, 4096, 4096, BF16),
        (8, 1024, 4096, 14336, BF16),
    ],
}


# some of the shapes, for what the op does besides
MORE = {"cpu": SHAPES["cpu"][1:2], "cuda": SHAPES["cuda"][1:3]}
# layers, samples, tokens, features in and out, dtype: the projections of an encoder's attention
LAYERS = {"cpu": [(24, 16, 16, 384, FP32)], "cuda": [(48, 32, 64, 768, BF16), (24, 16, 128, 384, BF16)]}


@pytest.mark.parametrize(("device", "n", "t", "i", "o", "dtype"), harness.on_devices(SHAPES))
def test_fisher_linear(compare, device, n, t, i, o, dtype):
    x = torch.randn(n, t, i, device=device).to(dtype)
    dy = torch.randn(n, t, o, device=device).to(dtype)
    fisher = torch.zeros(o, i, device=device)
    testing.assert_matches_reference(
        "fisher_linear_", torch.ops.sparseft.fisher_linear_, testing.Sample("benchmark", (fisher, x, dy))
    )
    grad = torch.empty(o, i, dtype=dtype, device=device)
    rows, columns = dy.view(-1, o), x.view(-1, i)
    compare(
        harness.Case("fisher_linear_", f"{n} x {t} tokens, {i} -> {o}", dtype=dtype, device=device),
        lambda: torch.ops.sparseft.fisher_linear_(fisher, x, dy),
        {
            "torch weight gradient": lambda: torch.mm(rows.T, columns, out=grad),
            "reference": lambda: reference.fisher_linear_(fisher, x, dy),
        },
        rounds=15,
        floor=harness.Floor(moved=x.nbytes + dy.nbytes + 2 * fisher.nbytes, flops=2 * n * t * o * i + 2 * n * o * i),
    )


@pytest.mark.parametrize(("device", "n", "t", "i", "o", "dtype"), harness.on_devices(MORE))
def test_padding(compare, device, n, t, i, o, dtype):
    """Samples of t / 6 to t tokens, evenly spread, against samples of t."""
    x = torch.randn(n, t, i, device=device).to(dtype)
    dy = torch.randn(n, t, o, device=device).to(dtype)
    lengths = torch.linspace(t / 6, t, n, device=device).round()
    padded = dy * (torch.arange(t, device=device) < lengths[:, None]).unsqueeze(-1)
    fisher, grad = torch.zeros(o, i, device=device), torch.empty(o, i, dtype=dtype, device=device)
    testing.assert_matches_reference(
        "fisher_linear_", torch.ops.sparseft.fisher_linear_, testing.Sample("benchmark", (fisher, x, padded))
    )
    kept = int(lengths.sum())
    compare(
        harness.Case("fisher_linear_", f"{n} x {t // 6} to {t} tokens, {i} -> {o}", dtype=dtype, device=device),
        lambda: torch.ops.sparseft.fisher_linear_(fisher, x, padded),
        {
            "no padding": lambda: torch.ops.sparseft.fisher_linear_(fisher, x, dy),
            "torch weight gradient": lambda: torch.mm(padded.view(-1, o).T, x.view(-1, i), out=grad),
        },
        rounds=15,
        floor=harness.Floor(
            moved=kept * (i + o) * dtype.itemsize + 2 * fisher.nbytes, flops=2 * kept * o * i + 2 * n * o * i
        ),
    )


@pytest.mark.parametrize("density", [1.0, 0.005])
@pytest.mark.parametrize(("device", "n", "t", "i", "o", "dtype"), harness.on_devices(MORE))
def test_scores(compare, device, n, t, i, o, dtype, density):
    """Each sample's squares too, over selected entries or over all, against the op without them."""
    x = torch.randn(n, t, i, device=device).to(dtype)
    dy = torch.randn(n, t, o, device=device).to(dtype)
    fisher, scores = torch.zeros(o, i, device=device), torch.zeros(n, device=device)
    selected = None if density == 1 else torch.rand(o, i, device=device) < density
    arguments = (fisher, x, dy, None, scores, selected)
    testing.assert_matches_reference(
        "fisher_linear_", torch.ops.sparseft.fisher_linear_, testing.Sample("benchmark", arguments)
    )
    compare(
        harness.Case("fisher_linear_", f"{n} x {t} tokens, {i} -> {o}, scores", density, dtype, device),
        lambda: torch.ops.sparseft.fisher_linear_(*arguments),
        {"no scores": lambda: torch.ops.sparseft.fisher_linear_(fisher, x, dy)},
        rounds=15,
    )


@pytest.mark.parametrize(("device", "count", "n", "t", "features", "dtype"), harness.on_devices(LAYERS))
def test_small_layers(compare, device, count, n, t, features, dtype):
    xs, dys = ([torch.randn(n, t, features, device=device).to(dtype) for _ in range(count)] for _ in range(2))
    fishers = [torch.zeros(features, features, device=device) for _ in range(count)]
    grad = torch.empty(features, features, dtype=dtype, device=device)
    testing.assert_matches_reference(
        "fisher_linears_", torch.ops.sparseft.fisher_linears_, testing.Sample("benchmark", (fishers, xs, dys))
    )

    def one_by_one():
        for fisher, x, dy in zip(fishers, xs, dys, strict=True):
            torch.ops.sparseft.fisher_linear_(fisher, x, dy)

    def weight_gradients():
        for x, dy in zip(xs, dys, strict=True):
            torch.mm(dy.view(-1, features).T, x.view(-1, features), out=grad)

    shape = f"{count} layers {features} -> {features}, {n} x {t} tokens"
    compare(
        harness.Case("fisher_linears_", shape, dtype=dtype, device=device),
        lambda: torch.ops.sparseft.fisher_linears_(fishers, xs, dys),
        {"one call a layer": one_by_one, "torch weight gradients": weight_gradients},
        rounds=15,
        floor=harness.Floor(
            moved=count * (2 * xs[0].nbytes + 2 * fishers[0].nbytes), flops=count * (2 * n * t + 2 * n) * features**2
        ),
    )
