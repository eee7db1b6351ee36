"""Packed index lists: back to the positions they are of, at two bytes an entry, and nothing else taken for one."""

import contextlib

import pytest
import torch
from torch import nn

import sparseft
from sparseft import testing
from sparseft.index_lists import BLOCK, PACKED, check_packed, count, index_dtype, pack, positions, smallest


def some(numel, k, seed=0):
    return testing.random_indices(numel, k, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("numel", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 100_003])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.3, 1.0])
def test_positions_come_back(device, numel, share):
    wanted = some(numel, int(share * numel)).to(device)
    packed = pack(wanted, numel)
    assert packed.dtype == PACKED
    assert packed.device == wanted.device
    assert count(packed, numel) == len(wanted) == count(wanted, numel)
    check_packed("w", packed, numel)
    found = positions(packed, numel)
    assert found.dtype == torch.int32
    assert torch.equal(found, wanted)
    assert positions(wanted, numel) is wanted


def test_blocks_without_entries_and_ends_of_blocks():
    wanted = torch.tensor([0, 1, BLOCK - 1, BLOCK, 7 * BLOCK - 1, 9 * BLOCK, 10 * BLOCK - 1], dtype=torch.int32)
    assert torch.equal(positions(pack(wanted, 10 * BLOCK), 10 * BLOCK), wanted)


@pytest.mark.parametrize("numel", [2**31 - 1, 2**31, 2**31 + 5 * BLOCK + 3, 3 * 2**31])
def test_tensors_of_2_to_the_31_elements(numel):
    wanted = torch.tensor([0, 5, 2**30, 2**31 - 2, numel - 1]).unique().to(index_dtype(numel))
    packed = pack(wanted, numel)
    assert torch.equal(positions(packed, numel), wanted)
    assert positions(packed, numel).dtype == index_dtype(numel)


@pytest.mark.parametrize("density", [0.01, 0.05])
def test_at_most_2_2_bytes_an_entry_from_1_percent_on(density):
    numel = 768 * 3072
    packed = pack(some(numel, int(density * numel)), numel)
    assert packed.nbytes <= 2.2 * int(density * numel)


@pytest.mark.parametrize("compact", [False, True])
def test_a_mask_its_optimizer_and_its_gradients_share_their_lists(compact):
    """At 1 %, all that is kept of where entries lie takes at most 2.2 bytes an entry."""
    model = nn.Sequential(nn.Embedding(700, 256), nn.Linear(256, 512), nn.Linear(512, 256))
    mask = sparseft.select("random", model, density=0.01, progress=False)
    kept = {name: mask.index_list(name) for name in mask}
    with sparseft.compact_gradients(model, mask) if compact else contextlib.nullcontext():
        optimizer = sparseft.SparseAdamW(mask.param_groups(model))
        model(torch.arange(50)).square().sum().backward()
        optimizer.step()
        lists = [*kept.values(), *optimizer.param_groups[0]["indices"]]
        if compact:
            chosen = [parameter.selection for name, parameter in model.named_parameters() if name in mask]
            lists += [each.entries.index_list for each in chosen]
            lists += [way.where for each in chosen for way in (each.linear, each.conv1d) if way is not None]
    size = sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in lists}.values())
    assert size <= 2.2 * mask.k


def test_the_smaller_form_is_kept():
    numel = 1000 * BLOCK
    few, many = some(numel, 1000), some(numel, 100_000)
    assert smallest(few, numel) is few
    packed = smallest(many, numel)
    assert packed.dtype == PACKED
    assert packed.nbytes < many.nbytes
    assert smallest(packed, numel) is packed


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-1],
        lambda packed: packed[:3],
        lambda packed: packed.view(1, -1),
        lambda packed: torch.cat([packed, packed[-1:]]),
        lambda packed: packed.index_fill(0, torch.tensor([0]), 1),  # the first start
        lambda packed: packed.index_fill(0, torch.tensor([2]), 20_000),  # the second
        lambda packed: packed.index_fill(0, torch.tensor([len(packed) - 1]), -1),
        lambda packed: packed.index_fill(0, torch.tensor([len(packed) - 1]), BLOCK),
    ],
)
def test_a_damaged_list_is_refused(damage):
    numel = 3 * BLOCK
    packed = pack(some(numel, 500), numel)
    check_packed("w", packed, numel)
    with pytest.raises(ValueError, match=r"indices of w must be an index list of a tensor of 24576 elements"):
        check_packed("w", damage(packed), numel)
    with pytest.raises(ValueError, match="packed one of another"):
        check_packed("w", packed, numel + BLOCK)
