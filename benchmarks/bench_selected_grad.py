"""A Linear's weight gradient at the selected entries, against the dense one, which the entries are then taken from.

Floor: one multiply-add a token and entry; both inputs moved once, the entries read and written.
"""

import harness
import pytest
import torch

from sparseft import testing
from sparseft.index_lists import pack

FP32, BF16 = torch.float32, torch.bfloat16
# tokens, in, out, density, dtype
SHAPES = {
    "cpu": [
        (2048, 768, 3072, 0.005, FP32),
        (2048, 768, 3072, 0.012, FP32),
        (2048, 768, 3072, 0.05, FP32),
        (2048, 3072, 768, 0.005, FP32),
        (2048, 384, 1536, 0.005, FP32),
        (2048, 384, 1536, 0.05, FP32),
        (2048, 768, 3072, 0.005, BF16),
    ],
    "cuda": [
        (2048, 768, 3072, 0.005, BF16),
        (8192, 4096, 4096, 0.0005, BF16),
        (8192, 4096, 4096, 0.005, BF16),
        (8192, 4096, 4096, 0.05, BF16),
        (2048, 4096, 14336, 0.05, BF16),
    ],
}


@pytest.mark.parametrize(("device", "m", "i", "o", "density", "dtype"), harness.on_devices(SHAPES))
def test_selected_grad(compare, device, m, i, o, density, dtype):
    x, dy = torch.randn(m, i, device=device).to(dtype), torch.randn(m, o, device=device).to(dtype)
    generator = torch.Generator().manual_seed(0)
    positions = testing.random_indices(o * i, int(density * o * i), generator).to(device)
    grad, wide, indices = torch.zeros(positions.numel(), device=device), positions.long(), pack(positions, o * i)
    selected_grad_ = torch.ops.sparseft.selected_grad_
    testing.assert_matches_reference(
        "selected_grad_", selected_grad_, testing.Sample("benchmark", (grad, x, dy, indices))
    )
    compare(
        harness.Case("selected_grad_", f"{m} tokens, {i} -> {o}", density=density, dtype=dtype, device=device),
        lambda: selected_grad_(grad, x, dy, indices),
        {
            "torch dense gradient": lambda: dy.T @ x,
            "torch dense gradient, gather": lambda: grad.add_((dy.T @ x).view(-1)[wide]),
        },
        rounds=15,
        floor=harness.Floor(moved=x.nbytes + dy.nbytes + 2 * grad.nbytes + indices.nbytes, flops=2 * m * grad.numel()),
    )
