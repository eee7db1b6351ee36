"""Squared per-sample gradients of a stack of experts, against their ordinary weight gradients: a product an expert.

Floor: those products' operations and one multiply-add a segment and weight; x, dy and the scores moved once.
"""

import harness
import pytest
import torch

from sparseft import reference, testing

# experts, samples, rows that a sample sends to each, features in and out, dtype
FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = {
    "cpu": [(8, 16, 32, 384, 1536, FP32), (8, 16, 8, 384, 1536, FP32)],
    "cuda": [(8, 16, 256, 4096, 14336, BF16), (64, 16, 64, 2048, 1408, BF16), (64, 16, 16, 2048, 1408, BF16)],
}


@pytest.mark.parametrize(("device", "experts", "n", "rows", "i", "o", "dtype"), harness.on_devices(SHAPES))
def test_fisher_segments(compare, device, experts, n, rows, i, o, dtype):
    # as many rows on average: a router sends some samples' tokens here, others' there
    lengths = torch.randint(1, 2 * rows, (experts * n,), generator=torch.Generator().manual_seed(0))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    groups = torch.arange(experts, device=device).repeat_interleave(n)
    total = int(lengths.sum())
    x, dy = (torch.randn(total, features, device=device).to(dtype) for features in (i, o))
    fisher = torch.zeros(experts, o, i, device=device)
    arguments = (fisher, x, dy, offsets, groups)
    testing.assert_matches_reference(
        "fisher_segments_", torch.ops.sparseft.fisher_segments_, testing.Sample("benchmark", arguments)
    )
    grads = torch.empty(experts, o, i, dtype=dtype, device=device)
    ends = offsets[n::n].tolist()
    parts = [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    def products():
        for part, grad in zip(parts, grads, strict=True):
            torch.mm(dy[part].T, x[part], out=grad)

    compare(
        harness.Case(
            "fisher_segments_",
            f"{experts} experts {i} -> {o}, {n} samples, {rows} rows of each",
            dtype=dtype,
            device=device,
        ),
        lambda: torch.ops.sparseft.fisher_segments_(*arguments),
        {"torch weight gradients": products, "reference": lambda: reference.fisher_segments_(*arguments)},
        rounds=9,
        floor=harness.Floor(moved=x.nbytes + dy.nbytes + 2 * fisher.nbytes, flops=2 * (total + len(lengths)) * o * i),
    )
