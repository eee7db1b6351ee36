"""Deltas of an encoder at half a percent: swapped in and out, written, read, and how large they are.

Floor of the swap: the memory lines that hold selected weights read and written; 4 bytes of index and a value read and
written, an entry.
"""

import harness
import pytest
import safetensors.torch
import torch
import workloads

import sparseft
from sparseft import reference, testing

DENSITY = 0.005
SHAPE = "MiniLM, 22.7 M weights"


@pytest.fixture
def trained():
    """A model whose selected entries differ from its base, its mask, and the base's state."""
    model = workloads.encoder("cpu")
    mask = sparseft.select("random", model, density=DENSITY, progress=False)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, index in mask.items():
            parameters[name].view(-1)[index.long()] += 0.5
    return model, mask, base


@pytest.mark.parametrize("device", testing.devices())
def test_swap(compare, trained, tmp_path, device):
    model, mask, base = trained
    sparseft.save_delta(model, mask, tmp_path / "delta.safetensors")
    tuned = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(base)
    model.to(device)
    applied = sparseft.load_delta(model, tmp_path / "delta.safetensors")
    assert_state(model, tuned)
    applied.restore()
    assert_state(model, base)
    params = [dict(model.named_parameters())[name].detach() for name in mask]
    indices = [index.to(device) for index in mask.values()]
    values = torch.ops.sparseft.gather(params, indices)
    compare(
        harness.Case("delta_swap_", SHAPE, DENSITY, device=device),
        applied.swap,
        {"torch indexing": lambda: reference.delta_swap_(params, indices, values)},
        rounds=101,
        floor=harness.Floor(moved=2 * harness.lines_touched(indices, 4, device) + mask.k * (4 + 2 * 4)),
    )


def test_save(compare, trained, tmp_path):
    model, mask, _ = trained
    delta, whole = tmp_path / "delta.safetensors", tmp_path / "whole.safetensors"
    sparseft.save_delta(model, mask, delta)
    safetensors.torch.save_file(model.state_dict(), whole)
    compare(
        harness.Case("save_delta", SHAPE, DENSITY),
        lambda: sparseft.save_delta(model, mask, delta),
        {"safetensors, all weights, not flushed": lambda: safetensors.torch.save_file(model.state_dict(), whole)},
        rounds=9,
        sizes={"sparseft": delta.stat().st_size, "safetensors, all weights, not flushed": whole.stat().st_size},
    )


def test_load(compare, trained, tmp_path):
    """Read, compared with the fingerprint of the base, swapped in and out again."""
    model, mask, base = trained
    delta, whole = tmp_path / "delta.safetensors", tmp_path / "whole.safetensors"
    sparseft.save_delta(model, mask, delta)
    safetensors.torch.save_file(model.state_dict(), whole)
    fresh = workloads.encoder("cpu")
    applied = sparseft.load_delta(fresh, delta)
    assert_state(fresh, model.state_dict())
    applied.restore()
    assert_state(fresh, base)
    compare(
        harness.Case("load_delta", f"{SHAPE}, base checked", DENSITY),
        lambda: sparseft.load_delta(fresh, delta).restore(),
        {"safetensors, all weights": lambda: model.load_state_dict(safetensors.torch.load_file(whole))},
        rounds=9,
    )


def test_save_mask(compare, trained, tmp_path):
    _, mask, _ = trained
    ours, plain = tmp_path / "mask.safetensors", tmp_path / "plain.safetensors"
    mask.save(ours)
    assert sparseft.Mask.load(ours) == mask
    safetensors.torch.save_file(dict(mask), plain)
    compare(
        harness.Case("mask.save", SHAPE, DENSITY),
        lambda: mask.save(ours),
        {"safetensors, int32 lists, not flushed": lambda: safetensors.torch.save_file(dict(mask), plain)},
        rounds=9,
        sizes={"sparseft": ours.stat().st_size, "safetensors, int32 lists, not flushed": plain.stat().st_size},
    )


def assert_state(model, expected):
    assert all(torch.equal(value.cpu(), expected[name]) for name, value in model.state_dict().items())
