"""Attention as the Fisher pass computes it on the CPU, forward and backward, against torch's own.

Either all queries have a gradient, or the first of each sample alone, as in the last layer of a classifier. Floor: the
multiply-adds of two products forward and five backward, one of which is the first again; backward of those queries.
"""

import harness
import pytest
import torch
import torch.nn.functional as F

from sparseft import attention, products

# samples, tokens, heads, features of each
SHAPES = {"cpu": [(16, 128, 12, 32), (16, 128, 12, 64), (4, 512, 12, 64)], "cuda": []}


@pytest.mark.parametrize("live", ["all", "first"])
@pytest.mark.parametrize(("device", "n", "t", "h", "d"), harness.on_devices(SHAPES))
def test_attention(compare, device, n, t, h, d, live):
    if live == "all" and not products.prefer_onednn():
        pytest.skip("on this processor torch's own kernels serve")
    tensors = [torch.randn(n, t, h, d, device=device).transpose(1, 2).requires_grad_() for _ in range(3)]
    queries = t if live == "all" else 1
    dy = torch.randn(n, t, h, d, device=device).transpose(1, 2)
    dy[:, :, queries:] = 0

    def pull(function):
        out = function(*tensors)
        return [out, *torch.autograd.grad(out, tensors, dy)]

    check(pull(attention.scaled_dot_product_attention), tensors, dy)
    suffix = "" if live == "all" else ", gradient of one query"
    compare(
        harness.Case("attention, forward + backward", f"N{n} T{t}, {h} heads of {d}{suffix}", device=device),
        lambda: pull(attention.scaled_dot_product_attention),
        {"torch scaled_dot_product_attention": lambda: pull(F.scaled_dot_product_attention)},
        rounds=31,
        floor=harness.Floor(flops=2 * n * h * t * d * (2 * t + 5 * queries)),
    )


def check(results, tensors, dy):
    """Hold output and gradients to the accuracy of fp32, against fp64."""
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out = F.scaled_dot_product_attention(*exact)
    for got, want in zip(results, [out, *torch.autograd.grad(out, exact, dy.double())], strict=True):
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
