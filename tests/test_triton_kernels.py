"""What the Triton backend holds beyond agreeing with the reference: tables, tiles, far addresses, odd bits, errors."""

import importlib

import pytest
import torch

from sparseft import index_lists, kernels, testing
from sparseft.kernels import multi_tensor

fisher_linear = importlib.import_module("sparseft.kernels.fisher_linear")
tiles = importlib.import_module("sparseft.kernels.tiles")
# without a GPU the kernels run in Triton's interpreter
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
FAR = 2**31 + 100
ADAMW = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
LION = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}
OPTIMIZERS = {"adamw_": ADAMW, "lion_": LION, "sgd_": SGD}


def tensor(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def optimizer_lists(k, param_dtype, grad_dtype, master):
    """One parameter of 3 k weights, of which every third is selected: the lists that AdamW takes."""
    param, grad = randn(3 * k, dtype=param_dtype), randn(3 * k, dtype=grad_dtype)
    index = torch.arange(0, 3 * k, 3, dtype=torch.int32, device=DEVICE)
    masters = param[::3].float() if master else tensor([])
    return [param], [grad], [index], [randn(k)], [randn(k).abs()], [masters], [tensor(3.0)]


def lists_and_options(op, lists):
    """Leave out the second state where an optimizer has but one."""
    return (lists if op == "adamw_" else lists[:4] + lists[5:]), OPTIMIZERS[op]


def joined(*calls):
    return tuple([item for lists in arguments for item in lists] for arguments in zip(*calls, strict=True))


def count_launches(monkeypatch, module, kernel):
    module = importlib.import_module(f"sparseft.kernels.{module}")
    original, grids = getattr(module, kernel), []

    class Counting:
        def __getitem__(self, grid):
            grids.append(grid)
            return original[grid]

    monkeypatch.setattr(module, kernel, Counting())
    return grids


def test_table_sends_every_element_to_exactly_one_program():
    rows = ((5, 70), (0, 71), (4, 72), (9, 73))
    table, programs = multi_tensor.make_table(rows, 4, torch.device("cpu"))
    table = table.tolist()
    found = []
    for row, start in zip(table[0 : 2 * programs : 2], table[1 : 2 * programs : 2], strict=True):
        size, address = table[row], table[row + 1]
        found += [(address, element) for element in range(start, min(start + 4, size))]
    assert found == [(address, element) for size, address in rows for element in range(size)]


def test_table_is_made_anew_when_sizes_change_and_not_when_nothing_does():
    first = multi_tensor.cached_table(((5, 70),), 4, DEVICE)
    assert multi_tensor.cached_table(((5, 70),), 4, DEVICE)[0] is first[0]
    assert multi_tensor.cached_table(((9, 70),), 4, DEVICE)[1] == 3


@pytest.mark.parametrize("k", [1, multi_tensor.CHUNK - 1, multi_tensor.CHUNK, multi_tensor.CHUNK + 1])
def test_list_kernels_at_the_edges_of_a_chunk(k):
    source, index = randn(2 * k), torch.arange(1, 2 * k, 2, device=DEVICE)
    assert torch.equal(kernels.gather([source], [index])[0], source[1::2])
    sample = testing.Sample(f"k {k}", optimizer_lists(k, torch.float32, torch.float32, False), ADAMW)
    testing.assert_matches_reference("adamw_", kernels.adamw_, sample)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("op", ["gather", "delta_swap_", *OPTIMIZERS])
def test_packed_lists_change_no_bit(op, dtype):
    where = 2 if op in OPTIMIZERS else 1
    for sample in testing.sample_inputs(op, DEVICE.type, dtype):
        results = []
        for form in (index_lists.positions, repacked):
            lists = list(map(form, sample.args[where], [tensor.numel() for tensor in sample.args[0]]))
            arguments = (*sample.args[:where], lists, *sample.args[where + 1 :])
            changed = testing.Sample(sample.id, arguments, sample.kwargs)
            results.append(testing.observe(op, getattr(kernels, op), changed))
        for plain, packed in zip(*results, strict=True):
            assert torch.equal(plain.flatten().view(torch.uint8), packed.flatten().view(torch.uint8)), sample.id


def repacked(indices, numel):
    return index_lists.pack(index_lists.positions(indices, numel), numel)


@pytest.mark.parametrize("numel", [1, 8191, 8192, 8193, 100_003])
@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
def test_entries_of_a_packed_list_are_where_the_list_says(numel, density):
    """Blocks that are empty, sparse and full; the first and the last; a chunk in one block and over many."""
    chosen = torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < density
    chosen[9000:40_000] = False
    chosen[-1] = True
    positions, source = chosen.nonzero().flatten().to(DEVICE), torch.arange(numel, device=DEVICE)
    packed = index_lists.pack(positions, numel)
    assert torch.equal(kernels.gather([source], [packed])[0], positions)
    kernels.delta_swap_([source], [packed], [-positions])
    assert torch.equal(source < 0, chosen.to(DEVICE) & (torch.arange(numel, device=DEVICE) > 0))


@pytest.mark.parametrize("op", OPTIMIZERS)
def test_one_step_is_one_launch_for_each_kind_of_dtypes(monkeypatch, op):
    grids = count_launches(monkeypatch, op.rstrip("_"), f"_{op}kernel")
    kinds = [(torch.float32, torch.float32, False), (torch.bfloat16, torch.bfloat16, True)]
    lists = joined(*(optimizer_lists(k, *kind) for k in (3, 2000, 7, 50) for kind in kinds))
    lists, options = lists_and_options(op, lists)
    getattr(kernels, op)(*lists, **options)
    assert grids == [(5,), (5,)]


@pytest.mark.parametrize("op", OPTIMIZERS)
@pytest.mark.parametrize("param_dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", testing.DTYPES, ids=str)
def test_optimizers_take_gradients_of_other_dtypes(op, param_dtype, grad_dtype):
    lists = optimizer_lists(40, param_dtype, grad_dtype, param_dtype != torch.float32)
    lists, options = lists_and_options(op, lists)
    testing.assert_matches_reference(op, getattr(kernels, op), testing.Sample("mixed", lists, options))


def test_optimizer_takes_strided_gradients_and_16_bit_weights_without_a_master():
    lists = optimizer_lists(40, torch.bfloat16, torch.bfloat16, False)
    lists[1][0] = randn(120, 2, dtype=torch.bfloat16)[:, 1]
    testing.assert_matches_reference("adamw_", kernels.adamw_, testing.Sample("strided", lists, ADAMW))


def test_weight_changed_from_outside_wins_over_its_master():
    lists = optimizer_lists(40, torch.float16, torch.float32, True)
    lists[0][0][::6] += 1
    testing.assert_matches_reference("adamw_", kernels.adamw_, testing.Sample("swapped in", lists, ADAMW))


@pytest.mark.parametrize("step", [1, 2, 30, 500, 10**6])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999999), (0.99, 0.5)])
def test_bias_correction_keeps_full_precision(step, betas):
    """From zero weights the update itself is compared: 1 - beta2**step in plain fp32 would spoil its fifth digit."""
    lists = optimizer_lists(40, torch.float32, torch.float32, False)
    lists[0][0].zero_()
    lists[6][0].fill_(step - 1)
    options = {**ADAMW, "beta1": betas[0], "beta2": betas[1]}
    testing.assert_matches_reference("adamw_", kernels.adamw_, testing.Sample("from zero", lists, options), ulps=4)


def test_steps_follow_tensors_that_moved():
    """A table of addresses outlives the tensors it was made for; it must not be used for others."""
    for _ in range(3):
        lists = optimizer_lists(2000, torch.float32, torch.float32, False)
        testing.assert_matches_reference("adamw_", kernels.adamw_, testing.Sample("moved", lists, ADAMW))


@pytest.mark.parametrize("packed", [False, True])
def test_list_kernels_reach_beyond_2_to_the_31_elements(packed):
    far = tensor([3, FAR - 90, FAR - 1], torch.int64)
    indices = index_lists.pack(far, FAR) if packed else far
    source = torch.empty(FAR, dtype=torch.int8, device=DEVICE)
    source[far] = tensor([5, 6, 7], torch.int8)
    assert kernels.gather([source], [indices])[0].tolist() == [5, 6, 7]
    values = tensor([1, 2, 3], torch.int8)
    kernels.delta_swap_([source], [indices], [values])
    assert (values.tolist(), source[far].tolist()) == ([5, 6, 7], [1, 2, 3])
    param = torch.empty(FAR, dtype=torch.float16, device=DEVICE)
    param[far] = 1
    grad, state = tensor([1.0, 1.0, -1.0]), torch.zeros(3, device=DEVICE)
    lists = [param], [grad], [indices], [state], [tensor([])], [tensor(1.0)]
    kernels.sgd_(*lists, lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.0)
    assert param[far].tolist() == [0.5, 0.5, 1.5]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_delta_swap_keeps_every_bit_and_undoes_itself(dtype):
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (64 * dtype.itemsize,), dtype=torch.uint8).to(DEVICE)
    param, index = bits.view(dtype), torch.arange(0, 64, 2, dtype=torch.int32, device=DEVICE)
    value = param.flip(0)[:32].clone()
    before, wanted = param.clone(), param.clone()
    wanted[::2] = value
    replaced = before[::2].clone()
    kernels.delta_swap_([param], [index], [value])
    assert torch.equal(param.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(value.view(torch.uint8), replaced.view(torch.uint8))
    kernels.delta_swap_([param], [index], [value])
    assert torch.equal(param.view(torch.uint8), before.view(torch.uint8))


def test_topk_tells_neighbouring_numbers_apart_in_all_their_bits():
    """Scores that share their upper half, subnormal numbers, the largest ones, both signs; several chunks."""
    bits = torch.cat([torch.arange(3000) + first for first in (0, 0x3F7FF000, 0x7F7FFFFF - 2999)]).to(torch.int32)
    scores = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)]).to(DEVICE)
    scores = scores[torch.randperm(18000, generator=torch.Generator().manual_seed(0)).to(DEVICE)]
    for k in (2999, 9001, 17000):
        sample = testing.Sample(f"k {k}", ([scores[:7000], scores[7000:]], k))
        testing.assert_matches_reference("topk_indices", kernels.topk_indices, sample)


def test_topk_ranks_scores_of_mixed_dtypes_together():
    scores = [randn(300 + i).to(dtype) for i, dtype in enumerate(testing.DTYPES)] + [randn(5000).half()]
    scores.append(scores[0].bfloat16().float())
    for k in (10, 1000):
        testing.assert_matches_reference("topk_indices", kernels.topk_indices, testing.Sample("mixed", (scores, k)))


def test_topk_counts_scores_that_are_not_finite_and_only_them():
    largest = torch.finfo(torch.float32).max
    scores = tensor([largest, -largest, 0.0, float("inf"), float("-inf"), float("nan"), -float("nan")])
    with pytest.raises(ValueError, match="must be finite, got 4 NaN or infinite"):
        kernels.topk_indices([scores], 2)
    assert kernels.topk_indices([scores[:3]], 2)[0].tolist() == [0, 2]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("block_t", [32, 64])
def test_fisher_is_the_same_from_every_tile(monkeypatch, dtype, block_t):
    """On a weight of more rows of tiles than are grouped, with sides that are no multiple of any tile."""
    monkeypatch.setattr(tiles, "GROUP_O", 2)
    x, dy, weight = randn(2, 35, 70, dtype=dtype), randn(2, 35, 270, dtype=dtype), tensor([0.5, 2.0])
    plain = testing.Sample("tiles", (torch.ones(270, 70, device=DEVICE), x, dy, weight))
    scored = testing.Sample("tiles, scores", (*plain.args, weight.clone(), randn(270, 70) > 0))
    for aligned in (True, False):
        for sample in (plain, scored):
            for tile in tiles.available(dtype, aligned, block_t, selected=sample is scored):
                testing.assert_matches_reference("fisher_linear_", launcher(tile), sample)


def launcher(tile):
    """fisher_linear_ with one tile instead of a choice."""

    def launch(fisher, x, dy, weight=None, scores=None, selected=None):
        fisher_linear.launch(fisher, x, dy, weight, tile, scores=scores, selected=selected)

    return launch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["samples first", "tokens first"])
def test_fisher_by_descriptors_and_by_pointers_is_the_same(monkeypatch, dtype, order):
    """Whole blocks, the end of all tokens inside a block, padding that ends with a block, padding inside one."""
    x, dy = randn(5, 100, 144, dtype=dtype), randn(5, 100, 48, dtype=dtype)
    if order == "tokens first":
        x, dy = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, dy))
    dy[1, :36] = dy[2, 64:] = dy[3] = 0
    assert tiles.has_descriptors(x, dy)
    for cut in (False, True):
        if cut:
            dy[4, 70:], x[4, 70:] = 0, float("inf")
        sample = testing.Sample("descriptors", (torch.zeros(48, 144, device=DEVICE), x, dy))
        launch = launcher(tiles.available(dtype, True, 64)[1])
        testing.assert_matches_reference("fisher_linear_", launch, sample)
        by_descriptor = testing.observe("fisher_linear_", launch, sample)
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "has_descriptors", lambda x, dy: False)
            assert torch.equal(testing.observe("fisher_linear_", launch, sample)[0], by_descriptor[0])


@pytest.mark.parametrize("spoil", ["stride 0", "odd features", "odd start", "fp32", "Ampere"])
def test_descriptors_are_for_what_the_copy_engine_can_load(monkeypatch, spoil):
    monkeypatch.setattr(tiles, "gpu", lambda device: (spoil != "Ampere", 132))
    x, dy = (torch.empty(2, 10, 64, dtype=torch.bfloat16) for _ in range(2))
    spoiled = {
        "stride 0": x[:, :1].expand(2, 10, 64),
        "odd features": x[..., :63],
        "odd start": x[..., 1:],
        "fp32": x.float(),
        "Ampere": x,
    }
    assert tiles.has_descriptors(x, dy) == (spoil != "Ampere")
    assert not tiles.has_descriptors(spoiled[spoil], dy)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 255, 256, 600])
def test_spans_end_at_the_outermost_rows_that_are_not_zero(dtype, features):
    """In every feature's place, also the last; a NaN is not zero, zeros of both signs are."""
    dy = torch.zeros(6, 50, features, dtype=dtype, device=DEVICE)
    dy[0] = 1
    dy[1, 17, -1], dy[1, 33, features // 2] = 1e-7 if dtype != torch.float16 else 6e-8, -1
    dy[2, 49, 0] = float("nan")
    dy[3, 0, -1] = float("inf")
    dy[4] = -0.0
    dy[5, 15:17, -1] = 1
    spans = fisher_linear.find_spans(dy)
    first, end = 50 - spans[:, 0], spans[:, 1]
    assert first.tolist() == [0, 17, 49, 0, 50, 15]
    assert end.tolist() == [50, 34, 50, 1, 0, 17]


def test_fisher_takes_the_largest_tile_that_occupies_the_gpu(monkeypatch):
    monkeypatch.setattr(tiles, "gpu", lambda device: (True, 132))
    wanted = {(3072, 768): (128, 128, 64), (1536, 768): (64, 128, 64), (256, 256): (64, 64, 64)}
    for (o, i), tile in wanted.items():
        x, dy = torch.empty(1, 100, i, dtype=torch.bfloat16), torch.empty(1, 100, o, dtype=torch.bfloat16)
        assert tiles.choose([(x, dy)])[:3] == tile
        assert tiles.choose([(x[:, :20], dy[:, :20])])[2] == 32
        assert tiles.choose([(x[:, :20], dy[:, :20])], selected=True)[:3] == (64, 64, 32)
    assert tiles.choose([(x, dy)] * 20)[:3] == (64, 128, 64)
    x, dy = torch.empty(1, 100, 768, dtype=torch.bfloat16), torch.empty(1, 100, 3072, dtype=torch.bfloat16)
    assert tiles.choose([(x[..., 1:], dy)])[:3] == (64, 64, 32)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_layers_in_one_launch_get_the_bits_they_get_alone(monkeypatch, dtype):
    """Aligned and not, with padding, of few tokens, of one, of none; every kind is one launch."""
    sizes = [(3, 70, 64, 80), (2, 5, 37, 53), (4, 70, 128, 64), (5, 1, 20, 30), (2, 40, 64, 16), (6, 1, 16, 48)]
    layers = [(randn(o, i).square(), randn(n, t, i, dtype=dtype), randn(n, t, o, dtype=dtype)) for n, t, i, o in sizes]
    layers.append((torch.zeros(3, 4, device=DEVICE), randn(0, 7, 4, dtype=dtype), randn(0, 7, 3, dtype=dtype)))
    layers[0][2][1, 20:], layers[0][1][1, 20:] = 0, float("nan")
    packed = torch.zeros(3, 40, 64, device=DEVICE)
    layers.append((packed[1], *(randn(2, 40, f, dtype=dtype) for f in (64, 40))))
    # the smallest tile, alone and together
    monkeypatch.setattr(tiles, "gpu", lambda device: (True, 1000))
    alone = [fisher.clone() for fisher, *_ in layers]
    for fisher, (_, x, dy) in zip(alone, layers, strict=True):
        kernels.fisher_linear_(fisher, x, dy)
    grids = count_launches(monkeypatch, "fisher_linears", "_fisher_linears_kernel")
    kernels.fisher_linears_(*(list(tensors) for tensors in zip(*layers, strict=True)))
    for fisher, (together, *_) in zip(alone, layers, strict=True):
        assert torch.equal(fisher, together)
    assert not packed[0].any()
    assert not packed[2].any()
    # aligned or not, of several tokens or of one
    assert len(grids) == 4


@pytest.mark.parametrize(("t", "stride"), [(3, (FAR // 2, 30)), (3, (30, FAR // 2)), (33, (30, FAR // 32))])
def test_fisher_reaches_beyond_2_to_the_31_elements(t, stride):
    """By sample, by token inside a block, by block of tokens."""
    x = torch.empty(FAR + 100, dtype=torch.float16, device=DEVICE).as_strided((3, t, 30), (*stride, 1))
    x.copy_(randn(3, t, 30))
    fisher, dy = torch.zeros(20, 30, device=DEVICE), randn(3, t, 20, dtype=torch.float16)
    sample = testing.Sample("far", (fisher, x.clone(), dy))
    testing.assert_matches_reference("fisher_linear_", lambda f, _, d: kernels.fisher_linear_(f, x, d), sample)


def test_fisher_writes_into_a_view_and_leaves_the_rest():
    """A slice of a packed weight's Fisher, and the transposed Fisher of a weight stored [in, out]."""
    x, dy = randn(2, 20, 50), randn(2, 20, 40)
    plain, packed, stored = (torch.zeros(*shape, device=DEVICE) for shape in [(40, 50), (120, 50), (50, 40)])
    kernels.fisher_linear_(plain, x, dy)
    kernels.fisher_linear_(packed[40:80], x, dy)
    kernels.fisher_linear_(stored.T, x, dy)
    assert torch.equal(packed, torch.cat([torch.zeros_like(plain), plain, torch.zeros_like(plain)]))
    assert torch.equal(stored, plain.T)


def test_fisher_of_features_that_are_not_contiguous():
    x, dy = randn(2, 50, 20).transpose(1, 2), randn(2, 20, 1).expand(2, 20, 40)
    sample = testing.Sample("strided features", (torch.zeros(40, 50, device=DEVICE), x, dy))
    testing.assert_matches_reference("fisher_linear_", lambda f, *_: kernels.fisher_linear_(f, x, dy), sample)
    assert not x.is_contiguous()


META = torch.device("meta")
PACKED = index_lists.pack(torch.arange(0, 120, 3), 120).to(DEVICE)
BAD_LISTS = {
    "a list is shorter": (lambda lists: lists[2].pop(), ValueError, "one tensor a parameter"),
    "indices are floats": (lambda lists: lists[2].append(lists[2].pop().float()), TypeError, r"indices\[1\].*int32"),
    "a packed list is cut short": (
        lambda lists: lists[2].__setitem__(1, PACKED[:3]),
        ValueError,
        r"indices\[1\] must be a packed list of a tensor of 120 elements, of 4 int16 numbers and .*, got 3",
    ),
    "a packed list is of a larger tensor": (
        lambda lists: lists[2].__setitem__(1, index_lists.pack(torch.arange(40, device=DEVICE), 9000)),
        ValueError,
        r"exp_avgs\[1\].* 42 ",
    ),
    "a packed list lies at an odd address": (
        lambda lists: lists[2].__setitem__(1, torch.cat([PACKED[:1], PACKED])[1:]),
        ValueError,
        r"indices\[1\] must lie at a multiple of 4 bytes",
    ),
    "a parameter is strided": (
        lambda lists: lists[0].append(lists[0].pop()[::2]),
        ValueError,
        r"params\[1\].*strided",
    ),
    "a parameter is int8": (lambda lists: lists[0].append(lists[0].pop().char()), TypeError, r"params\[1\].*int8"),
    "a gradient has no right size": (lambda lists: lists[1].append(lists[1].pop()[:20]), ValueError, r"grads\[1\]"),
    "a state is bf16": (lambda lists: lists[3].append(lists[3].pop().bfloat16()), TypeError, r"exp_avgs\[1\].*bfloat"),
    "a state is short": (lambda lists: lists[4].append(lists[4].pop()[1:]), ValueError, r"exp_avg_sqs\[1\].* 39 "),
    "a master is short": (lambda lists: lists[5].append(lists[3][0][1:]), ValueError, "one tensor a parameter"),
    "a step is elsewhere": (lambda lists: lists[6].append(lists[6].pop().to(META)), ValueError, r"steps\[1\].*meta"),
}


@pytest.mark.parametrize(("spoil", "error", "message"), BAD_LISTS.values(), ids=BAD_LISTS.keys())
def test_optimizer_refuses_what_would_be_a_stray_write(spoil, error, message):
    lists = joined(*(optimizer_lists(40, torch.float32, torch.float32, False) for _ in range(2)))
    spoil(lists)
    before = lists[0][0].clone()
    with pytest.raises(error, match=message):
        kernels.adamw_(*lists, **ADAMW)
    assert torch.equal(lists[0][0], before)


def test_launchers_refuse_bad_arguments():
    scores, x = randn(10), torch.zeros(2, 3, 4, device=DEVICE)
    fisher, pair = torch.zeros(4, 4, device=DEVICE), tensor([1.0, 1.0])
    bad_calls = [
        (kernels.topk_indices, ([], 1), ValueError, "at least one"),
        (kernels.topk_indices, ([scores.double()], 1), TypeError, "float64"),
        (kernels.topk_indices, ([scores], 11), ValueError, "from 0 to the number of scores, 10, got 11"),
        (kernels.topk_indices, ([scores, scores.to(META)], 1), ValueError, r"scores\[1\] must be on"),
        (kernels.gather, ([scores], [scores]), TypeError, r"indices\[0\]"),
        (kernels.gather, ([scores], [PACKED[:2]]), ValueError, r"indices\[0\] must be a packed list"),
        (kernels.gather, ([scores], [PACKED[1:6]]), ValueError, r"indices\[0\] must lie at"),
        (kernels.delta_swap_, ([scores], [PACKED[::2]], [scores]), ValueError, r"indices\[0\].*strided"),
        (kernels.outer_at, (x, x, PACKED), TypeError, "int32 or int64 .*, got torch.int16"),
        (
            kernels.delta_swap_,
            ([scores], [tensor([1], torch.int64)], [tensor([1.0]).half()]),
            TypeError,
            r"values\[0\].*float16",
        ),
        (kernels.fisher_linear_, (torch.zeros(5, 4, device=DEVICE), x, x), ValueError, r"\(4, 4\), got \(5, 4\)"),
        (kernels.fisher_linear_, (torch.zeros(4, 4, device=DEVICE), x, x[:, :2]), ValueError, "x and dy must be"),
        (kernels.fisher_linear_, (torch.zeros(4, 4, device=DEVICE), x, x.half()), TypeError, "float16"),
        (kernels.fisher_linear_, (torch.zeros(4, 4, device=DEVICE).half(), x, x), TypeError, "fisher must be float32"),
        (kernels.fisher_linear_, (fisher, x, x, tensor([1.0])), ValueError, "sample_weight"),
        (kernels.fisher_linear_, (fisher, x, x, None, tensor([1.0])), ValueError, r"scores must be .* \[2\], got"),
        (kernels.fisher_linear_, (fisher, x, x, None, None, fisher > 0), ValueError, "got no scores"),
        (kernels.fisher_linear_, (fisher, x, x, None, pair, fisher), ValueError, "must be bool .* got torch.float32"),
        (kernels.fisher_linear_, (fisher, x, x, None, pair, fisher[1:] > 0), ValueError, r"\(4, 4\), got .*\(3, 4\)"),
        (kernels.fisher_linears_, ([fisher], [x, x], [x]), ValueError, "got 1, 2 and 1"),
        (kernels.fisher_linears_, ([fisher, fisher], [x, x], [x, x]), ValueError, "share memory"),
        (kernels.fisher_linears_, ([fisher, fisher[1:]], [x, x], [x, x]), ValueError, r"\(4, 4\), got \(3, 4\)"),
    ]
    for function, arguments, error, message in bad_calls:
        with pytest.raises(error, match=message):
            function(*arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_list_kernels_refuse_capture_in_a_cuda_graph():
    source, index = randn(100), torch.arange(10, device=DEVICE)
    with pytest.raises(RuntimeError, match="outside of the graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        kernels.gather([source], [index])
    layer = [torch.zeros(4, 4, device=DEVICE)], [randn(2, 3, 4)], [randn(2, 3, 4)]
    with pytest.raises(RuntimeError, match="outside of the graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        kernels.fisher_linears_(*layer)
