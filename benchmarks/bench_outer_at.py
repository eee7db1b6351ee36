"""Per-sample gradients of a Linear weight at chosen entries, against forming the gradients and gathering from them.

Floor: one multiply-add a token and entry; both inputs and the result moved once.
"""

import harness
import pytest
import torch

from sparseft import reference, testing

FP32, BF16 = torch.float32, torch.bfloat16
# samples, tokens, in, out, density, dtype
SHAPES = {
    "cpu": [
        (16, 128, 384, 1536, 0.005, FP32),
        (16, 128, 384, 1536, 0.0005, FP32),
        (16, 128, 768, 3072, 0.005, BF16),
    ],
    "cuda": [(16, 128, 768, 3072, 0.005, BF16), (8, 1024, 4096, 4096, 0.005, BF16)],
}


@pytest.mark.parametrize(("device", "n", "t", "i", "o", "density", "dtype"), harness.on_devices(SHAPES))
def test_outer_at(compare, device, n, t, i, o, density, dtype):
    x = torch.randn(n, t, i, device=device).to(dtype)
    dy = torch.randn(n, t, o, device=device).to(dtype)
    generator = torch.Generator().manual_seed(0)
    indices = testing.random_indices(o * i, int(density * o * i), generator).to(device)
    outer_at = torch.ops.sparseft.outer_at
    testing.assert_matches_reference("outer_at", outer_at, testing.Sample("benchmark", (dy, x, indices)))
    result = 4 * n * indices.numel()
    compare(
        harness.Case("outer_at", f"{n} x {t} tokens, {i} -> {o}", density=density, dtype=dtype, device=device),
        lambda: outer_at(dy, x, indices),
        {
            "torch bmm, gather": lambda: torch.bmm(dy.mT, x).flatten(1)[:, indices.long()],
            "reference": lambda: reference.outer_at(dy, x, indices),
        },
        rounds=15,
        floor=harness.Floor(moved=x.nbytes + dy.nbytes + result, flops=2 * n * t * indices.numel()),
    )
