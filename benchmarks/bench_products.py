"""A linear layer's product and the gradient of its input, by the library that is chosen, against torch's own choice.

Floor: a multiply-add a token and weight; both factors read and the result written once. The rate is the faster
library's.
"""

import harness
import pytest
import torch

from sparseft import products

# tokens, in, out; on a GPU there is one library only
SHAPES = {"cpu": [(2048, 384, 1536), (2048, 768, 3072)], "cuda": []}


@pytest.mark.parametrize("direction", ["forward", "input gradient"])
@pytest.mark.parametrize(("device", "m", "i", "o"), harness.on_devices(SHAPES))
def test_linear(compare, device, m, i, o, direction):
    weight, bias = torch.randn(o, i, device=device), torch.randn(o, device=device)
    if direction == "forward":
        rows = torch.randn(m, i, device=device)
    else:
        rows, weight, bias = torch.randn(m, o, device=device), weight.T, None
    check(rows, weight, bias)
    flops = 2 * m * weight.numel()
    compare(
        harness.Case("products.linear", f"{direction}, {m} tokens, {i} -> {o}", device=device),
        lambda: products.linear(rows, weight, bias),
        {"torch F.linear": lambda: torch.nn.functional.linear(rows, weight, bias)},
        rounds=31,
        floor=harness.Floor(moved=rows.nbytes + weight.nbytes + 4 * m * len(weight), flops=flops),
    )


def check(rows, weight, bias):
    """Hold the product to the accuracy of fp32, against fp64."""
    exact = torch.nn.functional.linear(rows.double(), weight.double(), None if bias is None else bias.double())
    assert float((products.linear(rows, weight, bias) - exact).abs().max()) <= 1e-5 * float(exact.abs().max())
