"""LayerNorm's backward with the gradients of weight and bias per sample, against torch's operations for the same.

Floor: input, its gradient and that of the output are read or written once.
"""

import harness
import pytest
import torch

# samples, tokens, features; on a GPU torch's operations serve
SHAPES = {"cpu": [(16, 128, 384), (16, 128, 768), (16, 16, 384)], "cuda": []}


@pytest.mark.parametrize(("device", "n", "t", "h"), harness.on_devices(SHAPES))
def test_layer_norm_backward(compare, device, n, t, h):
    x, dy = (torch.randn(n, t, h, device=device) for _ in range(2))
    weight, bias = torch.randn(h, device=device), torch.randn(h, device=device)
    _, mean, rstd = torch.native_layer_norm(x, [h], weight, bias, 1e-5)

    def ours():
        return torch.ops.sparseft.layer_norm_backward(dy, x, mean[..., 0], rstd[..., 0], weight)

    def theirs():
        dx = torch.ops.aten.native_layer_norm_backward(dy, x, [h], mean, rstd, weight, bias, [True, False, False])[0]
        return dx, (x - mean).mul_(rstd).mul_(dy).sum(1), dy.sum(1)

    for got, want in zip(ours(), theirs(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    compare(
        harness.Case("layer_norm_backward", f"N{n} T{t} H{h}", device=device),
        ours,
        {"torch, an operation each": theirs},
        rounds=31,
        floor=harness.Floor(moved=3 * x.nbytes),
    )
