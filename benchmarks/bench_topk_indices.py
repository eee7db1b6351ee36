"""Exact top-k over many tensors, in memory or in a file, against concatenating them. Floor: three reads of all scores.

The file is read from the system's cache, so that what is measured is not a disk.
"""

import harness
import pytest
import torch
import workloads
from safetensors.torch import load_file

from sparseft import ops

# tensors, entries of each, k; a GPU has room for a billion scores
SHAPES = {
    "cpu": [
        (workloads.TENSORS, workloads.ENTRIES, workloads.K),
        (4 * workloads.TENSORS, workloads.ENTRIES, 4 * workloads.K),
    ],
    "cuda": [(workloads.TENSORS, workloads.ENTRIES, workloads.K), (40, 25_000_000, 5_000_000)],
}


@pytest.mark.parametrize(("device", "tensors", "entries", "k"), harness.on_devices(SHAPES))
def test_topk_indices(compare, device, tensors, entries, k):
    scores = workloads.scores(device, tensors, entries)
    n = tensors * entries
    indices, counts = torch.ops.sparseft.topk_indices(scores, k)
    check(scores, indices.split(counts.tolist()), k)
    peaks = {}
    if entries == workloads.ENTRIES:
        peaks[ops.SERVED_BY["topk_indices"][device]] = harness.peak_bytes("topk_indices", device, tensors, k)
        peaks["torch.topk of cat"] = harness.peak_bytes("topk_of_cat", device, tensors, k)
    compare(
        harness.Case("topk_indices", f"{n:,} scores in {tensors} tensors", k / n, device=device),
        lambda: torch.ops.sparseft.topk_indices(scores, k),
        {"torch.topk of cat": lambda: workloads.topk_of_cat(scores, k)},
        rounds=9,
        floor=harness.Floor(moved=3 * 4 * n),
        peaks=peaks,
    )


def test_top_k_of_a_file(compare, tmp_path):
    tensors, k, path = 4 * workloads.TENSORS, 4 * workloads.K, str(tmp_path / "scores.safetensors")
    n = tensors * workloads.ENTRIES
    workloads.save_scores(path, tensors)
    scores, mask = load_file(path), workloads.topk_of_file(path, k)
    check(list(scores.values()), [mask[name] for name in scores], k)
    compare(
        harness.Case("top_k", f"{n:,} scores in a file", k / n),
        lambda: workloads.topk_of_file(path, k),
        {"load, torch.topk of cat": lambda: workloads.topk_of_loaded(path, k)},
        rounds=5,
        floor=harness.Floor(moved=3 * 4 * n),
        peaks={
            "sparseft": harness.peak_bytes("topk_of_file", "cpu", path, k),
            "load, torch.topk of cat": harness.peak_bytes("topk_of_loaded", "cpu", path, k),
        },
    )


def check(scores, lists, k):
    """Compare with torch, by value: which of two equal scores it takes, torch does not say."""
    assert all(bool((index[1:] > index[:-1]).all()) for index in lists)
    chosen = torch.cat([score[index.long()] for score, index in zip(scores, lists, strict=True)])
    assert torch.equal(chosen.sort(descending=True).values, torch.topk(torch.cat(scores), k).values)
