"""The blocks of dy^T x behind the CPU's Fisher ops, for every vector unit of this machine, in a process of its own.

ATEN_CPU_CAPABILITY, which torch reads once, says which is used. Run as a program, this file is that process.
"""

import os
import subprocess
import sys

import pytest
import torch

from sparseft import testing

_C = pytest.importorskip("sparseft._C", reason="the C++ extension is not built")
sparse = torch.ops.sparseft
UNITS = {"default": "baseline", "avx2": "AVX2", "avx512": "AVX-512"}
# samples, tokens, features of x and of dy: less than a block, whole blocks, ragged edges, several tiles, long samples
SHAPES = [(3, 7, 5, 3), (2, 24, 64, 12), (5, 17, 33, 7), (2, 65, 545, 260), (1, 2100, 40, 9), (1, 70_000, 70, 30)]


def check_against_fp64():
    """Sums of squares, and scores of selected entries, to 1e-5; entries far below the mean to 1e-6 of that."""
    generator = torch.Generator().manual_seed(0)
    for n, tokens, i, o in SHAPES:
        x, dy = (torch.randn(n, tokens, features, generator=generator) for features in (i, o))
        weight, start = torch.rand(n, generator=generator), torch.rand(o, i, generator=generator)
        selected = torch.rand(o, i, generator=generator) < 0.3
        squares = torch.einsum("nto,nti->noi", dy.double(), x.double()).square()
        wanted = start.double() + torch.einsum("n,noi->oi", weight.double(), squares)
        rows = (x.flatten(0, 1), dy.flatten(0, 1), torch.arange(0, n * tokens + 1, tokens))
        plain, scored, segments, scores = start.clone(), start.clone(), start.clone(), torch.zeros(n)
        sparse.fisher_linear_(plain, x, dy, weight)
        sparse.fisher_linear_(scored, x, dy, weight, scores, selected)
        sparse.fisher_segments_(segments, *rows, None, weight)
        for got in (plain, scored, segments):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6 * float(wanted.mean()))
        torch.testing.assert_close(scores.double(), squares[:, selected].sum(1), rtol=1e-5, atol=0)


def check_against_reference():
    for op in ("fisher_linear_", "fisher_linears_", "fisher_segments_"):
        for dtype in testing.DTYPES:
            for sample in testing.sample_inputs(op, dtype=dtype):
                testing.assert_matches_reference(op, getattr(sparse, op), sample)


@pytest.mark.parametrize("capability", UNITS)
def test_every_vector_unit(capability):
    here = torch.backends.cpu.get_cpu_capability().lower()
    if here in UNITS and list(UNITS).index(capability) > list(UNITS).index(here):
        pytest.skip(f"this machine has no more than {here}")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, __file__, UNITS[capability]]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    used = _C.build_info()["vector_unit"]
    assert used == sys.argv[1], f"used {used}, wanted {sys.argv[1]}"
    check_against_fp64()
    check_against_reference()
