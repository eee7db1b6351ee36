"""The weight gradient of whole rows, columns or blocks as dense products, against single entries and the dense one.

Floor: one multiply-add a token and entry; the rows and columns in use are read, the entries read and written.
"""

import harness
import pytest
import torch

from sparseft import products, testing
from sparseft.compact import bands
from sparseft.index_lists import pack

FP32, BF16 = torch.float32, torch.bfloat16
# tokens, in, out, structure, density, dtype
SHAPES = {
    "cpu": [
        (2048, 768, 3072, "row", 0.005, FP32),
        (2048, 768, 3072, "row", 0.05, FP32),
        (2048, 768, 3072, "row", 0.2, FP32),
        (2048, 768, 3072, "column", 0.005, FP32),
        (2048, 768, 3072, "column", 0.05, FP32),
        (2048, 768, 3072, "column", 0.2, FP32),
        (2048, 768, 3072, "block of 128", 0.05, FP32),
        (2048, 768, 3072, "block of 128", 0.2, FP32),
        (2048, 384, 1536, "row", 0.005, FP32),
        (2048, 384, 1536, "column", 0.01, FP32),
        (2048, 768, 3072, "row", 0.05, BF16),
    ],
    "cuda": [
        (8192, 4096, 4096, "row", 0.005, BF16),
        (8192, 4096, 4096, "row", 0.05, BF16),
        (8192, 4096, 4096, "column", 0.005, BF16),
        (8192, 4096, 4096, "column", 0.05, BF16),
        (8192, 4096, 4096, "block of 512", 0.05, BF16),
    ],
}


@pytest.mark.parametrize(("device", "m", "i", "o", "structure", "density", "dtype"), harness.on_devices(SHAPES))
def test_structured_grad(compare, device, m, i, o, structure, density, dtype):
    x, dy = torch.randn(m, i, device=device).to(dtype), torch.randn(m, o, device=device).to(dtype)
    chosen = units(structure, density, o, i).to(device)
    rows, columns = chosen.nonzero().unbind(1)
    found = bands.Bands.of(rows, columns, (o, i))
    positions = (rows * i + columns).int()
    grad, indices = torch.zeros(len(positions), device=device), pack(positions, o * i)
    check(bands.gradient(dy, x, found), x, dy, positions)
    read = x[:, chosen.any(0)].nbytes + dy[:, chosen.any(1)].nbytes
    compare(
        harness.Case("bands.gradient", f"{structure}, {m} tokens, {i} -> {o}", density, dtype, device),
        lambda: bands.gradient(dy, x, found),
        {
            "torch dense gradient": lambda: dy.T @ x,
            "dense gradient, the faster library": lambda: products.weight_gradient(dy, x),
            "selected_grad_": lambda: torch.ops.sparseft.selected_grad_(grad, x, dy, indices),
        },
        rounds=15,
        floor=harness.Floor(moved=read + 2 * grad.nbytes, flops=2 * m * grad.numel()),
    )


def units(structure, density, height, width):
    """Return where random units of a matrix are: bool [height, width]."""
    side = structure.rpartition(" ")[2]
    tall, wide = {"row": (1, width), "column": (height, 1)}.get(structure) or (int(side), int(side))
    grid = height // tall, width // wide
    at = testing.random_indices(grid[0] * grid[1], int(density * grid[0] * grid[1]), torch.Generator().manual_seed(0))
    chosen = torch.zeros(grid[0] * grid[1], dtype=torch.bool).index_fill_(0, at.long(), True).view(grid)
    return chosen.repeat_interleave(tall, 0).repeat_interleave(wide, 1)


def check(got, x, dy, positions):
    """Hold the entries to the accuracy of fp32, against fp64."""
    want = (dy.double().T @ x.double()).view(-1)[positions.long()]
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
