"""fisher_segments_ beyond small samples: against autograd, over many tiles, far addresses, its table, bad input."""

import itertools

import pytest
import torch

from sparseft import kernels, reference, testing
from sparseft.kernels.fisher_segments import block_table

DEVICE = testing.devices()[-1]
IMPLEMENTATIONS = [
    (device, name) for device in testing.devices() for name in testing.implementations("gather", device)
]
SLABS, ROWS, OFFSETS = torch.zeros(2, 4, 3), torch.ones(6, 3), torch.tensor([0, 2, 6])


def implementation(device, name):
    found = testing.implementations("fisher_segments_", device)
    return found["triton"] if name == "triton" else next(iter(found.values()))


def random_offsets(generator, segments, rows):
    inner = torch.randint(0, rows + 1, (segments - 1,), generator=generator).sort().values
    return torch.cat([torch.tensor([0]), inner, torch.tensor([rows])])


def test_the_reference_is_the_sum_of_squared_gradients_of_segments():
    generator = torch.Generator().manual_seed(0)
    x, cotangent = (torch.randn(9, size, dtype=torch.float64, generator=generator) for size in (5, 4))
    weight = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    offsets, groups = torch.tensor([0, 3, 3, 7, 9]), torch.tensor([1, 0, 0, 1])
    wanted = torch.zeros_like(weight)
    for (begin, end), group in zip(itertools.pairwise(offsets.tolist()), groups.tolist(), strict=True):
        y = torch.nn.functional.linear(x[begin:end], weight[group])
        (grad,) = torch.autograd.grad((y * cotangent[begin:end]).sum(), weight)
        wanted += grad.square()
    fisher = torch.zeros_like(wanted)
    reference.fisher_segments_(fisher, x, cotangent, offsets, groups)
    torch.testing.assert_close(fisher, wanted.detach())


@pytest.mark.parametrize(("device", "name"), IMPLEMENTATIONS)
def test_samples_of_one_length_are_those_of_fisher_linear(device, name):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(3, 21, features, generator=generator).to(device) for features in (40, 36))
    segments, linear = torch.zeros(36, 40, device=device), torch.zeros(36, 40, device=device)
    implementation(device, name)(segments, x.flatten(0, 1), dy.flatten(0, 1), torch.arange(0, 64, 21, device=device))
    torch.ops.sparseft.fisher_linear_(linear, x, dy)
    torch.testing.assert_close(segments, linear)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize(
    ("rows", "i", "o", "groups"), [(150, 384, 400, 5), (80, 1100, 70, 1), (300, 30, 20, 50), (40, 3, 900, 2)]
)
def test_many_tiles_and_groups_on_several_threads(threads, dtype, rows, i, o, groups):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(rows, features, generator=generator).to(dtype) for features in (i, o))
    segments = 3 * groups + 1
    offsets = random_offsets(generator, segments, rows)
    group = torch.randint(0, groups, (segments,), generator=generator)
    fisher, weight = torch.rand(groups, o, i, generator=generator), torch.rand(segments, generator=generator)
    sample = testing.Sample("large", (fisher, x, dy, offsets, group, weight))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        testing.assert_matches_reference("fisher_segments_", torch.ops.sparseft.fisher_segments_, sample)
    finally:
        torch.set_num_threads(before)


def test_rows_beyond_2_to_the_31_elements():
    stride = 2**31 // 30
    x = torch.empty(41 * stride + 30, dtype=torch.float16, device=DEVICE).as_strided((41, 30), (stride, 1))
    x.copy_(torch.randn(41, 30))
    dy, fisher = torch.randn(41, 20).to(DEVICE, torch.float16), torch.zeros(20, 30, device=DEVICE)
    sample = testing.Sample("far", (fisher, x.clone(), dy, torch.tensor([0, 1, 20, 41], device=DEVICE)))
    function = kernels.fisher_segments_
    testing.assert_matches_reference("fisher_segments_", lambda f, _, d, *rest: function(f, x, d, *rest), sample)


@pytest.mark.parametrize("block_t", [1, 16])
def test_the_table_holds_every_row_once(block_t):
    generator = torch.Generator().manual_seed(0)
    for rows, segments, groups in [(1, 1, 1), (100, 1, 2), (100, 7, 3), (17, 40, 5), (16, 1, 1)]:
        offsets = random_offsets(generator, segments, rows)
        group = torch.randint(0, groups, (segments,), generator=generator)
        blocks, starts = block_table(offsets, group, groups, rows, block_t)
        expected = []
        for g in range(groups):
            assert starts[g] == len(expected)
            for s in (group == g).nonzero()[:, 0].tolist():
                begin, end = offsets[s : s + 2].tolist()
                for row in range(begin, end, block_t):
                    expected.append([row, min(block_t, end - row), s if row + block_t >= end else -1])
        assert starts[groups] == len(expected) < len(blocks)
        assert blocks[: len(expected)].tolist() == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fisher": SLABS.double()}, "fisher must be float32"),
        ({"fisher": SLABS[0]}, "groups"),
        ({"fisher": SLABS[:, :3]}, "fisher"),
        ({"x": ROWS[:, None]}, "x"),
        ({"dy": torch.ones(5, 4)}, "dy"),
        ({"dy": torch.ones(6, 4).half()}, "float16"),
        ({"x": ROWS.double()}, "float64"),
        ({"offsets": OFFSETS.int()}, "offsets.* must be int64"),
        ({"offsets": OFFSETS[:0]}, "offsets"),
        ({"offsets": torch.tensor([0, 2, 7])}, "offsets.* must ascend"),
        ({"offsets": torch.tensor([0, 5, 4])}, "offsets.* must ascend"),
        ({"offsets": torch.tensor([-1, 2, 6])}, "offsets.* must ascend"),
        ({"groups": None}, "groups"),
        ({"groups": torch.tensor([0, 2])}, "below 2"),
        ({"groups": torch.tensor([-1, 0])}, "groups"),
        ({"groups": torch.tensor([0])}, "groups"),
        ({"weight": torch.ones(3)}, "weight"),
        ({"weight": torch.ones(2).double()}, "weight"),
    ],
)
@pytest.mark.parametrize(
    "function", [torch.ops.sparseft.fisher_segments_, kernels.fisher_segments_], ids=["c++", "triton"]
)
def test_bad_input_changes_nothing(function, changed, message):
    arguments = {"fisher": SLABS, "x": ROWS, "dy": torch.ones(6, 4), "offsets": OFFSETS}
    arguments |= {"groups": torch.tensor([0, 1]), "weight": None} | changed
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        function(*arguments.values())
    assert not arguments["fisher"].any()
