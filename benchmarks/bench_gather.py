"""Gather selected entries of many tensors, against torch's indexing of each.

Floor: the memory lines that hold them read, 4 bytes of index read and 4 of value written, an entry.
"""

import harness
import pytest
import torch
import workloads

from sparseft import reference, testing

DENSITY = 0.005


@pytest.mark.parametrize("device", testing.devices())
def test_gather(compare, device):
    values = workloads.scores(device)
    indices = workloads.selection(values, DENSITY)
    testing.assert_matches_reference(
        "gather", torch.ops.sparseft.gather, testing.Sample("benchmark", (values, indices))
    )
    compare(
        harness.Case("gather", "25 M entries in 25 tensors", DENSITY, device=device),
        lambda: torch.ops.sparseft.gather(values, indices),
        {"torch indexing": lambda: reference.gather(values, indices)},
        rounds=101,
        floor=harness.Floor(moved=harness.lines_touched(indices, 4, device) + 8 * sum(map(len, indices))),
    )
