"""Squared per-sample gradients of a Linear weight, against the ordinary weight gradient: one matrix product.

Floor: that product's operations and one multiply-add a sample and weight; x, dy and the scores moved once.
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
