"""selected_grad_ beyond its sample inputs: autograd as the oracle, many blocks, threads, tiles, runs, bad input."""

import importlib
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from sparseft import kernels, ops, testing
from sparseft.index_lists import BLOCK, pack
from sparseft.kernels.index_lists import load_columns, lower_bound

sparse = torch.ops.sparseft
triton_side = importlib.import_module("sparseft.kernels.selected_grad")
tiles = importlib.import_module("sparseft.kernels.tiles")
# without a GPU the Triton kernel runs in the interpreter
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
LAUNCHERS = [sparse.selected_grad_, kernels.selected_grad_]


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sample_of(generator, dtype, tokens, i, o, k):
    x, dy = (torch.randn(tokens, features, generator=generator).to(dtype) for features in (i, o))
    indices = testing.random_indices(o * i, k, generator)
    grad = torch.randn(k, generator=generator)
    return testing.Sample(f"M{tokens} I{i} O{o} k{k}", (grad, x, dy, indices)).map(lambda t: t.to(DEVICE))


def gradient_by_autograd(x, dy, indices):
    weight = torch.zeros(dy.shape[1], x.shape[1], dtype=torch.float64, device=x.device, requires_grad=True)
    output = torch.nn.functional.linear(x.double(), weight)
    (grad,) = torch.autograd.grad(output, weight, dy.double())
    return grad.flatten()[indices.long()]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(50, 30, 20, 90), (3, 7, 300, 2100), (130, 300, 70, 1), (65, 17, 33, 0)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("function", LAUNCHERS, ids=["dispatcher", "triton"])
def test_entries_are_those_of_the_gradient_that_autograd_finds(generator, function, packed, dtype, shape):
    grad, x, dy, indices = sample_of(generator, dtype, *shape).args
    wanted = grad.double() + gradient_by_autograd(x, dy, indices)
    function(grad, x, dy, pack(indices, dy.shape[1] * x.shape[1]) if packed else indices)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1000, 40, 300, 3000), (257, 300, 40, 3000), (129, 1500, 90, 5000), (3000, 600, 50, 20), (20, 90, 90, 8100)],
)
def test_over_many_blocks_and_threads(generator, restore_threads, dtype, shape, threads):
    torch.set_num_threads(threads)
    testing.assert_matches_reference("selected_grad_", sparse.selected_grad_, sample_of(generator, dtype, *shape))


@pytest.mark.parametrize("k", [500, 20000, 60000, 200000])
def test_results_do_not_depend_on_the_number_of_threads(generator, restore_threads, k):
    sample, results = sample_of(generator, torch.float32, 600, 200, 1000, k), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(testing.observe("selected_grad_", sparse.selected_grad_, sample)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("threads", [1, 3])
def test_whole_rows_and_columns(generator, restore_threads, threads):
    """Masks with structure: some neurons, some features; a few rows hold most of the work."""
    torch.set_num_threads(threads)
    chosen = torch.zeros(300, 3000, dtype=torch.bool)
    chosen[[3, 4, 200]] = True
    chosen[:, [17, 2999]] = True
    indices = chosen.flatten().nonzero().flatten().int()
    x, dy = torch.randn(70, 3000, generator=generator), torch.randn(70, 300, generator=generator)
    sample = testing.Sample("rows and columns", (torch.zeros(len(indices)), x, dy, indices))
    for function in LAUNCHERS:
        testing.assert_matches_reference("selected_grad_", function, sample.map(lambda t: t.to(DEVICE)))


def test_tokens_may_lie_far_apart(generator):
    """Further than 2^31 elements from first to last, and more than that from block to block."""
    memory, stride = torch.empty(2**31 + 2000, dtype=torch.float16, device=DEVICE), 2**26 + 5
    x, dy = memory.as_strided((33, 20), (stride, 1)), torch.randn(33, 9, generator=generator).half().to(DEVICE)
    x.copy_(torch.randn(33, 20, generator=generator))
    indices = testing.random_indices(180, 50, generator).to(DEVICE)
    wanted = gradient_by_autograd(x, dy, indices).float()
    for function in LAUNCHERS:
        grad = torch.zeros(50, device=DEVICE)
        function(grad, x, dy, indices)
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


def test_uses_of_a_weight_add_up(generator):
    """Two halves of the tokens, one after the other, against all of them at once."""
    grad, x, dy, indices = sample_of(generator, torch.float32, 96, 40, 50, 300).args
    for function in LAUNCHERS:
        whole, halves = grad.clone(), grad.clone()
        function(whole, x, dy, indices)
        function(halves, x[:40], dy[:40], indices)
        function(halves, x[40:], dy[40:], indices)
        torch.testing.assert_close(halves, whole)


def test_a_transposed_weight_swaps_the_inputs(generator):
    """Of transformers' Conv1D: y = x @ weight, weight [I, O]."""
    x, dy = torch.randn(9, 12, generator=generator), torch.randn(9, 7, generator=generator)
    indices = testing.random_indices(12 * 7, 30, generator)
    weight = torch.zeros(12, 7, requires_grad=True)
    (wanted,) = torch.autograd.grad(x @ weight, weight, dy)
    grad = torch.zeros(30)
    sparse.selected_grad_(grad, dy, x, indices)
    torch.testing.assert_close(grad, wanted.flatten()[indices])


@pytest.mark.parametrize("step", [200, 4])
def test_no_dense_gradient_is_ever_there(step):
    """By the process's own peak, which also counts what C++ allocates: a dense gradient would take 64 MiB."""
    script = f"""
import resource, torch, sparseft.ops
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
x, dy = torch.randn(64, 4096), torch.randn(64, 4096)
indices = torch.arange(0, 4096**2, {step})
grad = torch.zeros(len(indices))
torch.ops.sparseft.selected_grad_(grad[:10], x[:2], dy[:2], indices[:10])
held = torch.ones(2**25)  # uses up what was freed before
before = peak()
torch.ops.sparseft.selected_grad_(grad, x, dy, indices)
print(peak() - before)
"""
    if ops.SERVED_BY["selected_grad_"]["cpu"] == "reference":
        pytest.skip("the reference multiplies densely; the C++ extension is not built")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) <= 8 * 2**20


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_selected_is_not_multiplied(generator):
    """A feature that is infinite reaches the entries in its row or column, and no other."""
    grad, x, dy, indices = sample_of(generator, torch.float32, 20, 33, 50, 200).args
    x[3, 5], dy[7, 11] = float("inf"), float("nan")
    touched = (indices % 33 == 5) | (indices // 33 == 11)
    for function in LAUNCHERS:
        result = grad.clone()
        function(result, x, dy, indices)
        assert torch.equal(result.isfinite(), ~touched)


# the interpreter is slow, and fp16 goes the way of bf16
@pytest.mark.parametrize(
    ("dtype", "density"),
    [(torch.float16, 0.2), *((dtype, density) for dtype in testing.DTYPES[:2] for density in (0.01, 0.2, 1.0))],
    ids=str,
)
def test_every_tile_and_split_gives_the_same(monkeypatch, generator, dtype, density):
    """Aligned and not, several panels and groups of tiles, runs longer than what is picked at a time, rows without."""
    monkeypatch.setattr(tiles, "GROUP_O", 2)
    for i, o in [(272, 144), (259, 65)]:
        sample = sample_of(generator, dtype, 130, i, o, int(density * i * o))
        sample.args = (*sample.args[:3], pack(sample.args[3], i * o))
        small, large = tiles.Tile(32, 256, 16, 8, 3), tiles.Tile(128, 256, 64, 8, 3)
        for tile in (small,) if dtype == torch.float32 else (small, large):
            for splits in (1, 3):

                def launch(grad, x, dy, indices, tile=tile, splits=splits):
                    triton_side.launch(grad, x, dy, indices, tile, splits)

                testing.assert_matches_reference("selected_grad_", launch, sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_descriptors_and_pointers_give_the_same_bits(monkeypatch, generator, dtype):
    sample = sample_of(generator, dtype, 100, 288, 160, 900)
    by_descriptor = testing.observe("selected_grad_", kernels.selected_grad_, sample)[0]
    monkeypatch.setattr(tiles, "has_descriptors", lambda x, dy: False)
    assert torch.equal(testing.observe("selected_grad_", kernels.selected_grad_, sample)[0], by_descriptor)


@triton.jit
def _lower_bound_kernel(out, indices, blocks, positions, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out + n, lower_bound(indices, blocks, tl.load(positions + n)))


@pytest.mark.parametrize("numel", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 100_003, 2**31 - 1, 2**32 + 77])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 1.0])
def test_entries_before_a_position_are_found(generator, numel, density):
    """Positions next to entries, at the borders of blocks, past the end; blocks that are full, sparse and empty."""
    last = (numel - 1) // BLOCK
    held = {block for block in (0, 2, 3, last - 1, last) if 0 <= block <= last}
    inside = torch.cat([torch.arange(block * BLOCK, min(block * BLOCK + BLOCK, numel)) for block in sorted(held)])
    entries = inside[torch.rand(len(inside), generator=generator) < density]
    chosen = entries[torch.randperm(len(entries), generator=generator)[:80]]
    borders = torch.cat([inside[:: BLOCK // 2], torch.arange(5) * BLOCK, numel + torch.tensor([0, 1, 5000, 10**6])])
    positions = torch.cat([chosen - 1, chosen, chosen + 1, borders]).clamp(min=0)
    positions = torch.cat([positions, torch.zeros(512 - len(positions), dtype=torch.int64)])
    out = torch.full((512,), -1, dtype=torch.int32, device=DEVICE)
    blocks = triton.cdiv(numel, BLOCK)
    _lower_bound_kernel[(1,)](out, pack(entries, numel).to(DEVICE), blocks, positions.to(DEVICE), N=512)
    assert torch.equal(out.cpu(), torch.searchsorted(entries, positions, out_int32=True))


@triton.jit
def _load_columns_kernel(out, indices, blocks, starts, k, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out + n, load_columns(indices, blocks, n, n < k, tl.load(starts + n)))


@pytest.mark.parametrize("first", [0, BLOCK - 200, 2**31 - 200, 2**31, 2**32 - 200])
def test_columns_of_entries_are_found(generator, first):
    """Of entries up to 255 positions behind where their run begins, some of them in the next block."""
    entries = first + testing.random_indices(600, 256, generator).long()
    columns = torch.randint(256, (256,), generator=generator).minimum(entries)
    starts = entries - columns
    out, numel = torch.full((256,), -1, dtype=torch.int32, device=DEVICE), first + 1000
    blocks = triton.cdiv(numel, BLOCK)
    _load_columns_kernel[(1,)](out, pack(entries, numel).to(DEVICE), blocks, starts.to(DEVICE), 200, N=256)
    assert torch.equal(out.cpu()[:200], columns[:200].int())
    assert not out[200:].any()


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 300), (100, 257), (3, 5500), (600, 41)])
@pytest.mark.parametrize("chosen", ["a tenth", "all", "ends of rows", "two blocks"])
def test_every_entry_of_every_run_is_found(generator, shape, chosen):
    """The gradient at each position is made to be the position; rows begin and end anywhere in blocks."""
    rows, columns = shape
    position = torch.arange(rows * columns)
    tests = {
        "a tenth": torch.rand(len(position), generator=generator) < 0.1,
        "all": position >= 0,
        "ends of rows": (position % columns == 0) | (position % columns == columns - 1),
        "two blocks": (position // BLOCK == 0) | (position // BLOCK == 2),
    }
    position = position[tests[chosen]].to(DEVICE)
    row, column = (torch.arange(n, dtype=torch.float32, device=DEVICE) for n in shape)
    grad = torch.zeros(len(position), device=DEVICE)
    x, dy = torch.stack([torch.ones_like(column), column]), torch.stack([columns * row, torch.ones_like(row)])
    kernels.selected_grad_(grad, x, dy, pack(position, rows * columns))
    assert torch.equal(grad, position.float())


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_packed_and_plain_lists_give_the_same_bits(generator, dtype):
    grad, x, dy, indices = sample_of(generator, dtype, 70, 300, 65, 500).args
    results = []
    for form in (indices, indices.long(), pack(indices, 300 * 65)):
        results.append(
            testing.observe("selected_grad_", kernels.selected_grad_, testing.Sample("", (grad, x, dy, form)))[0]
        )
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_tokens_are_split_where_tiles_are_few(monkeypatch):
    monkeypatch.setattr(tiles, "gpu", lambda device: (True, 132))

    def splits(tokens, i, o):
        x, dy = torch.empty(tokens, i, dtype=torch.bfloat16), torch.empty(tokens, o, dtype=torch.bfloat16)
        return triton_side.choose_splits(x, dy, triton_side.choose_tile(x, dy))

    assert splits(8192, 4096, 4096) == 1  # 512 tiles: whole rounds anyway
    assert splits(2048, 768, 3072) == 5  # 72 tiles: 3 rounds of a fifth instead of one
    assert splits(2048, 768, 768) == 7  # 18 tiles: one round still
    assert splits(100, 8192, 8192) == 1


@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (0, torch.zeros(2, dtype=torch.bfloat16), "grad must be float32, got bfloat16"),
        (0, torch.zeros(3), "grad must have 2 elements, one for each of indices, got 3"),
        (0, torch.zeros(4)[::2], "grad must be contiguous"),
        (1, torch.zeros(3, 5, dtype=torch.float64), "x must be float32 or bfloat16 or float16, got float64"),
        (1, torch.zeros(1, 3, 5), r"x must be \[tokens, features\], got 3"),
        (2, torch.zeros(4, 4), "dy must have the tokens of x, 3, got 4"),
        (2, torch.zeros(3, 4).half(), "dy must have the dtype of x, float32, got float16"),
        (3, torch.tensor([0.0, 1.0]), "indices must be int32 or int64 or int16, got float32"),
        (3, torch.tensor([3, 1]), "indices must be sorted and unique"),
        (3, torch.tensor([1, 1]), "indices must be sorted and unique"),
        (3, torch.tensor([[1, 2]]), "indices must be one list"),
        (3, torch.tensor([0, 20]), "indices must be from 0 to 19, .*got 0 to 20"),
        (3, torch.tensor([-1, 2]), "indices must be from 0 to 19, .*got -1 to 2"),
    ],
)
def test_bad_arguments_are_named(position, bad, message):
    arguments = [torch.zeros(2), torch.ones(3, 5), torch.ones(3, 4), torch.tensor([0, 1])]
    arguments[position] = bad
    with pytest.raises(ValueError, match=message):
        sparse.selected_grad_(*arguments)
    assert not arguments[0].any()


@pytest.mark.parametrize(
    ("position", "bad", "error", "message"),
    [
        (0, torch.zeros(2).half(), TypeError, "grad must be float32"),
        (0, torch.zeros(3), ValueError, "grad must be contiguous"),
        (1, torch.zeros(3, 5).half(), TypeError, "both be fp32, bf16 or fp16"),
        (2, torch.zeros(4, 4), ValueError, r"\[M, I\] and \[M, O\]"),
        (3, torch.tensor([0.0, 1.0]), TypeError, "indices must be int32 or int64"),
        (3, pack(torch.arange(2), 20)[:3], ValueError, "packed list of a tensor of 20 elements, of 4 int16"),
        (3, torch.zeros(7, dtype=torch.int16)[1:], ValueError, "indices must lie at a multiple of 4 bytes"),
    ],
)
def test_the_triton_launcher_checks_too(position, bad, error, message):
    arguments = [torch.zeros(2), torch.ones(3, 5), torch.ones(3, 4), torch.tensor([0, 1])]
    arguments[position] = bad
    with pytest.raises(error, match=message):
        kernels.selected_grad_(*arguments)
