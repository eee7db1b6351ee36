"""Exact top-k over many tensors, against concatenating them. Floor: three reads of every score."""

import harness
import pytest
import torch
import workloads

from sparseft import ops

# tensors, entries of each, k; a GPU has room for a billion scores
SHAPES = {
    "cpu": [(workloads.TENSORS, workloads.ENTRIES, workloads.K)],
    "cuda": [(workloads.TENSORS, workloads.ENTRIES, workloads.K), (40, 25_000_000, 5_000_000)],
}


@pytest.mark.parametrize(("device", "tensors", "entries", "k"), harness.on_devices(SHAPES))
def test_topk_indices(compare, device, tensors, entries, k):
    scores = workloads.scores(device, tensors, entries)
    n = tensors * entries
    check(scores, k)
    peaks = {}
    if n == workloads.TENSORS * workloads.ENTRIES:
        peaks[ops.SERVED_BY["topk_indices"][device]] = harness.peak_bytes("topk_indices", device)
        peaks["torch.topk of cat"] = harness.peak_bytes("topk_of_cat", device)
    compare(
        harness.Case("topk_indices", f"{n:,} scores in {tensors} tensors", k / n, device=device),
        lambda: torch.ops.sparseft.topk_indices(scores, k),
        {"torch.topk of cat": lambda: workloads.topk_of_cat(scores, k)},
        rounds=9,
        floor=harness.Floor(moved=3 * 4 * n),
        peaks=peaks,
    )


def check(scores, k):
    """Compare with torch, by value: which of two equal scores it takes, torch does not say."""
    indices, counts = torch.ops.sparseft.topk_indices(scores, k)
    lists = indices.split(counts.tolist())
    assert all(bool((index[1:] > index[:-1]).all()) for index in lists)
    chosen = torch.cat([score[index.long()] for score, index in zip(scores, lists, strict=True)])
    assert torch.equal(chosen.sort(descending=True).values, torch.topk(torch.cat(scores), k).values)
