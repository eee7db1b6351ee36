"""Scores that stay in their files: the same masks as in memory, in the memory of a few blocks."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

import sparseft
from sparseft import files, testing
from sparseft.fisher.report import FisherReport, FisherScores
from sparseft.selection import Layout, score_files
from sparseft.selection.scopes import largest_stored

SHAPES = {"emb.weight": (13, 7), "layer.2.w": (10, 31), "layer.2.b": (31,), "layer.10.w": (3, 4, 5), "scale": ()}
N = 13 * 7 + 10 * 31 + 31 + 60 + 1


@pytest.fixture
def small_blocks(monkeypatch):
    """Read tensors of a few hundred scores in several blocks, the last one cut."""
    monkeypatch.setattr(score_files, "_BLOCK", 64)


def random_scores(seed=0, dtype=torch.float32, distinct=None):
    """Return scores of either sign, of every size, or of few values, with zeros of either sign among them."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in SHAPES.items():
        score = torch.randn(shape, generator=generator)
        if distinct:
            score = (score * distinct).round() / distinct  # -0.0 too
        else:
            score = score * 10.0 ** torch.randint(-6, 4, shape, generator=generator)
        made[name] = score.to(dtype)
    return made


def written(scores, folder, parts=1):
    """Return files that hold the scores, in this order as far as their dtype is one."""
    names, paths = list(scores), [folder / f"{part}.safetensors" for part in range(parts)]
    for path, some in zip(paths, np.array_split(names, parts), strict=True):
        save_file({str(name): scores[name].contiguous() for name in some}, path)
    return paths


def in_file_order(scores, paths):
    return {name: scores[name] for path in paths for name in files.places(path)[0]}


def best(scores, k):
    """Return the entries with the k largest scores, by numpy's sort of (score, place of the tensor, position)."""
    values = np.concatenate([score.double().flatten().numpy() for score in scores.values()]) + 0.0
    owners = np.concatenate([np.full(score.numel(), place) for place, score in enumerate(scores.values())])
    positions = np.concatenate([np.arange(score.numel()) for score in scores.values()])
    order = np.lexsort((positions, owners, -values))[:k]
    names = list(scores)
    return sorted((names[owners[i]], int(positions[i])) for i in order)


def entries(mask):
    return sorted((name, int(i)) for name, index in mask.items() for i in index)


@pytest.mark.filterwarnings("ignore:some selected entries score zero")
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("distinct", [None, 1, 3])
@pytest.mark.parametrize("parts", [1, 3])
def test_selects_the_largest_and_of_ties_the_first(dtype, distinct, parts, tmp_path, small_blocks):
    scores = random_scores(1, dtype, distinct)
    paths = written(scores, tmp_path, parts)
    for k in (1, 2, 63, 64, 65, 130, 300, N - 1, N):
        mask = sparseft.top_k(paths, k=k)
        assert entries(mask) == best(in_file_order(scores, paths), k), k
        assert mask.shapes == {name: tuple(score.shape) for name, score in scores.items()}


@pytest.mark.parametrize("block", [1, 7, 63, 1 << 18])
def test_any_size_of_block_gives_the_same(block, tmp_path, monkeypatch):
    scores = random_scores(2, distinct=2)
    monkeypatch.setattr(score_files, "_BLOCK", block)
    (path,) = written(scores, tmp_path)
    for k in (5, 200):
        assert entries(sparseft.top_k(path, k=k)) == best(in_file_order(scores, [path]), k)


@pytest.mark.filterwarnings("ignore:some selected entries score zero")
def test_numbers_at_the_ends_of_the_range_and_beside_zero(tmp_path, small_blocks):
    """Denormals, both zeros, which tie, the largest numbers, and neighbours that differ in the last bit."""
    bits = [0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x0000FFFF, 0x8000FFFF, 0x00010000, 0x80010000]
    bits += [0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0x3F800001, 0x3F7FFFFF, 0xBF800000, 0xBF800001, 0xBF7FFFFF]
    values = torch.from_numpy(np.array(bits * 9, dtype=np.uint32).view(np.float32).copy())
    scores = {"a": values, "b": values.flip(0).clone()}
    paths = written(scores, tmp_path)
    for k in range(1, 2 * len(values) + 1, 5):
        assert entries(sparseft.top_k(paths, k=k, progress=False)) == best(scores, k), k


def test_dtypes_may_differ_from_tensor_to_tensor(tmp_path, small_blocks):
    scores = random_scores(3)
    for place, name in enumerate(scores):
        scores[name] = scores[name].to(testing.DTYPES[place % 3])
    paths = written(scores, tmp_path, 2)
    for k in (3, 90, 400):
        assert entries(sparseft.top_k(paths, k=k)) == best(in_file_order(scores, paths), k)


SCOPES = [
    *({"scope": scope} for scope in ("global", "layer", "tensor", "row", "column")),
    {"scope": "block", "block": (2, 3)},
    {"structure": "row"},
    {"structure": "column", "scope": "layer"},
]


@pytest.mark.filterwarnings("ignore:some selected entries score zero")
@pytest.mark.parametrize("options", SCOPES, ids=str)
@pytest.mark.parametrize("distinct", [None, 2])
def test_every_scope_is_that_of_scores_in_memory(options, distinct, tmp_path, small_blocks):
    scores = {name: score.abs() for name, score in random_scores(4, distinct=distinct).items()}
    scores["nothing"] = torch.empty(0, 3)
    paths = written(scores, tmp_path, 2)
    held = in_file_order(scores, paths)
    options = {**options, "layouts": {"layer.2.w": Layout((10, 31), (1,), (0,))}, "unscored": {"head": (10, 10)}}
    for density in (0.2, 0.4, N / (N + 100)) if "structure" in options else (0.002, 0.05, 0.4, N / (N + 100)):
        found, wanted = sparseft.top_k(paths, density, **options), sparseft.top_k(held, density, **options)
        assert (found, list(found), found.info) == (wanted, list(wanted), wanted.info)
    if "structure" not in options and options["scope"] != "global":
        assert sparseft.top_k(paths, per_group=3, **options) == sparseft.top_k(held, per_group=3, **options)


def test_mapped_tensors_are_tensors(tmp_path):
    scores = torch.rand(10_000)
    scores.numpy().tofile(tmp_path / "raw")
    mapped = torch.from_file(str(tmp_path / "raw"), size=10_000, dtype=torch.float32)
    assert entries(sparseft.top_k({"w": mapped}, k=100)) == best({"w": scores}, 100)


def test_a_saved_estimate_is_read_in_the_order_of_the_model(tmp_path):
    """Layer 2 comes before layer 10, which a file sorts the other way; of equal scores the first are taken."""
    names = [f"layer.{i}.w" for i in range(12)]
    scores = FisherScores({name: torch.ones(5) for name in names}, FisherReport("empirical"))
    scores.report.rules = dict.fromkeys(names, "linear")
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    assert list(FisherScores.load(path)) == names
    for found in (sparseft.top_k(path, k=12), sparseft.top_k(str(path), k=12)):
        assert list(found) == names[:3]
        assert list(found.shapes) == names
        assert found == sparseft.top_k(scores, k=12)
    scores.report.rules = {}  # made by hand, and so in the order of the file
    scores.save(path)
    assert list(FisherScores.load(path)) == list(sparseft.top_k(path, k=60)) == sorted(names)


def test_scores_made_in_parts_are_selected_from_together(tmp_path):
    """Each part of a model by itself: the scores are never in memory together."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    data = [(torch.randn(8, 6), torch.randint(0, 3, (8,)))]
    paths = [tmp_path / "first", tmp_path / "second"]
    for path, names in zip(paths, (["0.weight", "0.bias"], ["2.weight", "2.bias"]), strict=True):
        sparseft.estimate_fisher(model, data, names=names, progress=False).save(path)
    whole = sparseft.estimate_fisher(model, data, progress=False)
    assert sparseft.top_k(paths, 0.3, progress=False) == sparseft.top_k(whole, 0.3)


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_named(value, scope, tmp_path, small_blocks):
    scores = random_scores()
    scores["layer.2.w"].view(-1)[77] = value
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinite values in layer\.2\.w; drop"):
        sparseft.top_k(written(scores, tmp_path), k=1, scope=scope)


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_scores_of_zero_are_told_of_as_in_memory(scope, tmp_path, small_blocks):
    scores = {"b": torch.zeros(70), "a": torch.zeros(9, 9)}
    paths = written(scores, tmp_path)
    with pytest.raises(ValueError, match="every score is zero"):
        sparseft.top_k(paths, k=10, scope=scope)
    scores["a"][:, 3] = 1
    paths = written(scores, tmp_path)
    for held in (in_file_order(scores, paths), paths):
        with pytest.warns(UserWarning, match=r"some selected entries score zero \(in a\)") as caught:
            sparseft.top_k(held, k=30, scope=scope)
        assert caught[0].filename == __file__


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-5])


def not_safetensors(path):
    path.write_text("scores")


def of_integers(path):
    save_file({"w": torch.ones(5, dtype=torch.int32)}, path)


def of_doubles(path):
    save_file({"w": torch.ones(5, dtype=torch.float64)}, path)


def a_mask(path):
    sparseft.Mask({"w": torch.tensor([1], dtype=torch.int32)}, {"w": (5,)}).save(path)


def empty(path):
    save_file({}, path)


def without_header(path):
    save_file({"w": torch.ones(4)}, path, metadata={"format": "sparseft fisher 1"})


def with_another_header(path):
    save_file({"w": torch.ones(4)}, path, metadata={"format": "sparseft fisher 1", "header": "{"})


def without_entries(path):
    save_file({"w": torch.ones(0, 4)}, path)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (cut_short, ValueError, r"1\.safetensors is not a readable safetensors file .* cut short"),
        (not_safetensors, ValueError, r"1\.safetensors is not a readable safetensors file"),
        (of_integers, TypeError, r"must be F32, BF16 or F16, got I32 for w in .*1\.safetensors"),
        (of_doubles, TypeError, "got F64 for w"),
        (a_mask, ValueError, r"1\.safetensors must be a file of scores, got a 'sparseft mask 1' file"),
        (without_header, ValueError, r"1\.safetensors is damaged: its header does not say what it holds"),
        (with_another_header, ValueError, r"1\.safetensors is damaged: its header does not say what it holds"),
        (os.remove, FileNotFoundError, r"1\.safetensors is not a file"),
    ],
)
def test_files_that_are_no_scores_are_refused(spoil, error, message, tmp_path):
    paths = written(random_scores(), tmp_path, 2)
    spoil(paths[1])
    with pytest.raises(error, match=message):
        sparseft.top_k(paths, 0.1)


@pytest.mark.parametrize("spoil", [empty, without_entries])
def test_files_without_scores_are_refused(spoil, tmp_path):
    spoil(tmp_path / "scores")
    for paths in (tmp_path / "scores", [tmp_path / "scores"], []):
        with pytest.raises(ValueError, match="nothing to select from"):
            sparseft.top_k(paths, 0.1)


def test_a_parameter_in_two_files_is_refused(tmp_path):
    paths = written(random_scores(), tmp_path, 2)
    save_file({"scale": torch.ones(4)}, tmp_path / "more")
    with pytest.raises(ValueError, match=r"one file, got scale in .*1\.safetensors and .*more"):
        sparseft.top_k([*paths, tmp_path / "more"], 0.1)


@pytest.mark.parametrize("scores", [7, None, [torch.ones(3)], {"file"}, b"file"])
def test_what_is_neither_tensors_nor_files_is_refused(scores):
    with pytest.raises(TypeError, match="a mapping from parameter name to tensor, a safetensors file or a list"):
        sparseft.top_k(scores, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density must lie in"),
        ({"density": 1.5}, "density must lie in"),
        ({"k": 0}, "k must be at least 1"),
        ({"k": N + 1}, f"k must be at most the {N} selectable entries, got {N + 1}"),
        ({}, "either density or k"),
    ],
)
def test_budgets_out_of_range_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sparseft.top_k(written(random_scores(), tmp_path), **options)


def cut(path):
    os.truncate(path, path.stat().st_size - 8)


def lengthen(path):
    with open(path, "ab") as file:
        file.write(bytes(8))


def overwrite(path):
    with open(path, "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    os.utime(path, (1, 1))  # a clock may stand still between two writes


@pytest.fixture
def bars(monkeypatch):
    """Return the bars that were made and what to call when one moves."""
    made, calls = [], []

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(**options, file=io.StringIO())
            self.options = options
            made.append(self)

        def update(self, n=1):
            for call in calls:
                call()
            return super().update(n)

    monkeypatch.setattr(score_files, "tqdm", Bar)
    return made, calls


@pytest.mark.parametrize("scope", ["global", "row"])
@pytest.mark.parametrize("change", [cut, lengthen, overwrite])
def test_a_file_that_changes_while_it_is_read_is_an_error(change, scope, tmp_path, bars, small_blocks):
    (path,) = written(random_scores(), tmp_path)
    bars[1].append(lambda: change(path))
    with pytest.raises(RuntimeError, match=r"0\.safetensors must stay as it is while scores are read from it"):
        sparseft.top_k(path, 0.1, scope=scope)


def test_a_file_that_is_replaced_meanwhile_counts_as_it_was(tmp_path, bars, small_blocks):
    """As a checkpoint is, by the pass that goes on writing it."""
    scores = random_scores()
    (path,) = written(scores, tmp_path)
    wanted = best(in_file_order(scores, [path]), 100)

    def replace():
        save_file({"other": torch.ones(10)}, tmp_path / "new")
        os.replace(tmp_path / "new", path)

    bars[1].append(replace)
    assert entries(sparseft.top_k(path, k=100)) == wanted
    assert list(load_file(path)) == ["other"]


@pytest.mark.parametrize("options", SCOPES[:6], ids=str)
def test_the_bar_counts_the_bytes_of_three_reads(options, tmp_path, bars, small_blocks):
    paths = written(random_scores(), tmp_path, 2)
    sparseft.top_k(paths, 0.5, **options)
    sparseft.top_k(paths, 0.5, **options, progress=False)
    shown, hidden = bars[0]
    assert shown.n == shown.total == 3 * 4 * N
    assert (shown.options["unit"], shown.options["delay"], shown.options["disable"]) == ("B", 2, False)
    assert hidden.options["disable"]


class FarScore:
    """Scores of a parameter with more elements than int32 can count, of which one block reaches the bar."""

    shape = torch.Size([3, 2**30])

    def __init__(self, first, block):
        self.first, self.block = first, block

    def numel(self):
        return self.shape.numel()

    def blocks(self):
        yield 0, torch.zeros(10)
        yield self.first, self.block


def test_positions_of_large_parameters_are_wide():
    first = 2**31 - 2
    scores = {"near": FarScore(100, torch.tensor([5.0, 1.0])), "far": FarScore(first, torch.tensor([9.0, 0, 8, 5, 5]))}
    found = largest_stored(scores, [(["near", "far"], 4)])
    assert found.indices["near"].tolist() == [100]
    assert found.indices["far"].tolist() == [first, first + 2, first + 3]
    assert found.indices["far"].dtype == torch.int64
    assert (found.highest, found.lowest) == (9.0, (5.0, "far"))


def test_scores_far_into_a_file_are_found(tmp_path):
    """Behind a parameter of more than 2^31 scores: a hole, which takes no space."""
    many, kept = 2**31 + 3, torch.tensor([1.0, 3.0, 2.0])
    end = 4 * many + kept.nbytes
    places = {"hole": ("F32", [many], [0, 4 * many]), "kept": ("F32", [3], [4 * many, end])}
    path = sparse_file(tmp_path / "scores", places, end)
    with open(path, "r+b") as file:
        file.seek(-kept.nbytes, os.SEEK_END)
        file.write(kept.numpy().tobytes())
    with score_files.opened(path, progress=False) as scores:
        assert scores["hole"].numel() == many
        assert [(first, block.tolist()) for first, block in scores["kept"].blocks()] == [(0, [1.0, 3.0, 2.0])]


def sparse_file(path, places, size):
    """Write a safetensors file of zeros that are not stored."""
    keys = ("dtype", "shape", "data_offsets")
    text = json.dumps({name: dict(zip(keys, place, strict=True)) for name, place in places.items()}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, path.stat().st_size + size)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset a process's peak")
@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
def test_memory_is_that_of_a_few_blocks(scope, tmp_path):
    """300 MB of scores, read within 64 MB, by the process's own peak, which also counts pages mapped from files."""
    path, generator = tmp_path / "scores", np.random.default_rng(0)
    tensors, size = 3, 25_000_000
    keys = {f"layer.{i}": ("F32", [5000, 5000], [4 * size * i, 4 * size * (i + 1)]) for i in range(tensors)}
    sparse_file(path, keys, 0)
    block = generator.random(1_000_000, dtype=np.float32).tobytes()
    with open(path, "ab") as file:
        for _ in range(tensors * size // 1_000_000):
            file.write(block)
    script = """
import sys, torch, sparseft
from safetensors.torch import save_file
from sparseft.integrations.measure import peak_memory, reset_peak_memory
folder, scope = sys.argv[1:]
save_file({"layer.0": torch.rand(1000)}, folder + "/small")
sparseft.top_k(folder + "/small", k=10, scope=scope)
reset_peak_memory()
before = peak_memory()
mask = sparseft.top_k(folder + "/scores", 0.001, scope=scope, progress=False)
print(mask.k, peak_memory() - before)
"""
    command = [sys.executable, "-c", script, str(tmp_path), scope]
    k, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert k == 75_000
    assert peak < 64 * 2**20
