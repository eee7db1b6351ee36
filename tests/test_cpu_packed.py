"""Packed index lists in the compiled CPU ops: the same results as from plain ones, and no damaged list is followed."""

import copy

import pytest
import torch

from sparseft import testing
from sparseft.index_lists import BLOCK, pack
from sparseft.testing_optim import OPTIMIZERS, optimizer_calls

pytest.importorskip("sparseft._C", reason="the C++ extension is not built")
sparse = torch.ops.sparseft
pytestmark = pytest.mark.usefixtures("threads")
NUMEL = 4 * BLOCK + 5
MOVING = ["gather", "delta_swap_"]
# an entry at both ends of a block, an empty block, and the last element
ENTRIES = torch.tensor([0, 7, BLOCK - 1, BLOCK, BLOCK + 5, 3 * BLOCK, 3 * BLOCK + 9, NUMEL - 1], dtype=torch.int32)
HEADER = 2 * 6


def plain_lists(generator):
    """Return (numel, positions) of many entries, all, few, two blocks of nine, one and none."""
    two_blocks = testing.random_indices(70_001, 9000, generator)
    two_blocks = two_blocks[(two_blocks // BLOCK == 3) | (two_blocks // BLOCK == 7)]
    drawn = [(300_001, 30_007), (BLOCK, BLOCK), (1_000_003, 999), (1, 1), (BLOCK + 1, 0)]
    lists = [(numel, testing.random_indices(numel, k, generator)) for numel, k in drawn]
    return [*lists[:3], (70_001, two_blocks), *lists[3:]]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("op", OPTIMIZERS)
def test_steps_are_bit_identical_to_those_of_plain_lists(generator, op, dtype):
    lists = plain_lists(generator)
    packed = [pack(index, numel) for numel, index in lists]

    def selected():
        return [torch.randn(numel, generator=generator).to(dtype) for numel, _ in lists], [i for _, i in lists]

    for name, args, kwargs in optimizer_calls(op, generator, selected):
        others, other_kwargs = copy.deepcopy(args), copy.deepcopy(kwargs)
        for _ in range(3):
            getattr(sparse, op)(*args, **kwargs)
            getattr(sparse, op)(*others[:2], packed[: len(args[0])], *others[3:], **other_kwargs)
        for ours, theirs in zip(tensors(args, kwargs), tensors(others, other_kwargs), strict=True):
            assert torch.equal(ours, theirs), name


def tensors(args, kwargs):
    lists = [*args, *(value for value in kwargs.values() if isinstance(value, list))]
    return [tensor.nan_to_num() for some in lists for tensor in some if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64, torch.complex128], ids=str)
def test_entries_of_every_size_are_moved_bit_for_bit(generator, dtype):
    lists = plain_lists(generator)
    packed = [pack(index, numel) for numel, index in lists]
    params = [(torch.randn(numel, generator=generator) * 9).to(dtype) for numel, _ in lists]
    values = [(torch.randn(len(index), generator=generator) * 9).to(dtype) for _, index in lists]
    old, new = [[tensor.clone() for tensor in some] for some in (params, values)]
    for got, before, (_, index) in zip(sparse.gather(params, packed), old, lists, strict=True):
        assert torch.equal(got, before[index.long()])
    sparse.delta_swap_(params, packed, values)
    for value, param, before, swapped, (_, index) in zip(values, params, old, new, lists, strict=True):
        assert torch.equal(value, before[index.long()])
        assert torch.equal(param[index.long()], swapped)
    sparse.delta_swap_(params, packed, values)
    assert all(torch.equal(param, before) for param, before in zip(params, old, strict=True))


@pytest.mark.parametrize("density", [0.001, 0.02, 0.19, 0.21, 1.0])
@pytest.mark.parametrize(("i", "o"), [(300, 130), (1100, 70), (7, 2500)])
def test_selected_gradients_are_bit_identical_to_those_of_plain_lists(generator, i, o, density):
    x, dy = (torch.randn(150, features, generator=generator) for features in (i, o))
    index = testing.random_indices(i * o, int(density * i * o), generator)
    some = index[index // BLOCK % 2 == 1]
    for entries in (index, some, index[:0]):
        grads = torch.randn(2, len(entries), generator=generator)
        grads[1] = grads[0]
        sparse.selected_grad_(grads[0], x, dy, entries)
        sparse.selected_grad_(grads[1], x, dy, pack(entries, i * o))
        assert torch.equal(*grads)


def changed(place, value):
    def damage(packed):
        return packed.index_fill(0, torch.tensor([place % len(packed)]), value)

    return damage


def start_of_block(block, start):
    def damage(packed):
        packed[:HEADER].view(torch.int32)[block] = start
        return packed

    return damage


COUNTS = r"must say, packed as int16, how many of its 8 entries lie before each block"
DAMAGED = {
    "empty": (lambda packed: packed[:0], r"must, packed as int16, have 12 numbers or more .*, got 0; use a mask"),
    "shorter than its header": (
        lambda packed: packed[:11],
        r"have 12 numbers or more .*, got 11",
    ),
    "entries before the first": (start_of_block(0, 1), COUNTS),
    "counts far outside": (start_of_block(2, 2**31 - 1), COUNTS),
    "a negative count": (start_of_block(2, -(2**31)), COUNTS),
    "counts that fall": (start_of_block(1, 6), COUNTS),
    "too few in all": (start_of_block(5, 7), COUNTS),
    "an offset below 0": (changed(-1, -1), r"must have, .*, positions from 0 to 8191 .*, got -1 at 7"),
    "an offset of the next block": (changed(HEADER, BLOCK), r"positions from 0 to 8191 .*, got 8192 at 0"),
    "an entry twice": (changed(HEADER + 1, 0), r"must be sorted and unique, got 0 after 0 at 1"),
    "not sorted": (changed(HEADER + 6, 0), r"must be sorted and unique, got 24576 after 24576 at 6"),
    "an entry in another block": (start_of_block(1, 5), r"must be sorted and unique, got 0 after 8191 at 3"),
    "the last outside": (changed(-1, 5), r"must be from 0 to 32772, inside .*, got 0 to 32773; use a mask"),
    "not aligned": (
        lambda packed: torch.cat([packed[:1], packed])[1:],
        r"must, packed as int16, begin at a multiple of 4 bytes, got a view that does not; call .clone\(\)",
    ),
    "gaps": (lambda packed: packed.repeat_interleave(2)[::2], "must be contiguous"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("op", [*MOVING, *OPTIMIZERS, "selected_grad_"])
def test_a_damaged_list_is_refused_before_the_first_write(op, damage):
    change, message = DAMAGED[damage]
    packed, good = pack(ENTRIES, NUMEL), pack(ENTRIES, NUMEL)
    arguments, options, written = call(op, good, change(packed))
    where = "indices" if op == "selected_grad_" else r"indices\[1\]"
    with pytest.raises(ValueError, match=f"{op}: {where} {message}" if message[0] == "m" else message):
        getattr(sparse, op)(*arguments, **options)
    assert all((tensor == 1).all() for tensor in written)


def call(op, first, second):
    """Return the arguments of an op on two tensors with these lists, its options, and what it would write."""
    written = [torch.ones(NUMEL) for _ in range(2)]
    values = [torch.ones(len(ENTRIES)) for _ in range(2)]
    if op == "selected_grad_":
        return (values[0], torch.ones(3, NUMEL), torch.ones(3, 1), second), {}, values
    if op in MOVING:
        return (written, [first, second], values)[: 2 if op == "gather" else 3], {}, [*written, *values]
    names, options, _ = OPTIMIZERS[op]
    states = [[value.clone() for value in values] for _ in names]
    steps = [torch.tensor(1.0) for _ in range(2)]
    arguments = (written, values, [first, second], *states, [torch.empty(0)] * 2, steps)
    return arguments, options, [*written, *values, *steps, *(tensor for state in states for tensor in state)]


@pytest.mark.parametrize("place", [0, 1, 4094, 4095, 4096, 4097, 19_999, 29_998])
def test_one_bad_entry_anywhere_in_a_long_list_is_found(place):
    numel = 100_000
    index = testing.random_indices(numel, 30_000, torch.Generator().manual_seed(1))
    packed = pack(index, numel)
    header = len(packed) - len(index)
    same_block = index // BLOCK == index[place] // BLOCK
    assert same_block[place + 1]
    packed[header + place + 1] = packed[header + place]
    position = int(index[place])
    with pytest.raises(ValueError, match=rf"got {position} after {position} at {place + 1};"):
        sparse.gather([torch.zeros(numel)], [packed])


def test_a_list_of_another_tensor_is_refused():
    with pytest.raises(
        ValueError, match=r"gather: indices\[0\] must say, packed as int16, how many of its \d+ entries"
    ):
        sparse.gather([torch.zeros(NUMEL + BLOCK)], [pack(ENTRIES, NUMEL)])


def test_outer_at_takes_positions_only(generator):
    left, right = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 5, generator=generator)
    with pytest.raises(ValueError, match="outer_at: indices must be int32 or int64, got int16"):
        sparse.outer_at(left, right, pack(torch.tensor([0, 7], dtype=torch.int32), 20))
