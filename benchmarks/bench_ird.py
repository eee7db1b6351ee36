"""IRD's whole grid of masks, 5 numbers of samples by 4 densities, against one Fisher pass over its samples."""

import functools
import itertools

import harness
import pytest
import workloads

from sparseft.selection import ird_search

# model, batches, samples, tokens
GRIDS = {"cpu": [("MiniLM", 8, 16, 48)], "cuda": [("MiniLM", 8, 16, 128), ("Llama of 1.36 B", 16, 8, 256)]}


@pytest.mark.parametrize("score", ["selected", "all"])
@pytest.mark.parametrize(("device", "name", "number", "n", "t"), harness.on_devices(GRIDS))
def test_ird_grid(compare, device, name, number, n, t, score):
    model, data = workloads.MODELS[name](device), workloads.batches(name, device, number, n, t)
    options = {"order": "grid", "select_by": "ladder", "sample_score": score, "progress": False}
    search = functools.partial(ird_search, model, data, 0.005, samples=n * number, **options)
    path, counts = search(), [n * number // 2**halvings for halvings in range(5)]
    assert [cell.samples for cell in path.cells] == [count for count, _ in itertools.product(counts, range(4))]
    shape = f"{name}, {number} x {n} x {t} tokens" + (", scored by all entries" if score == "all" else "")
    compare(
        harness.Case("ird_search", shape, density=0.005, dtype=next(model.parameters()).dtype, device=device),
        search,
        {"estimate_fisher": functools.partial(workloads.estimate_fisher, model, data)},
        rounds=3,
    )
