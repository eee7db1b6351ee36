"""Kernels of embeddings and gradients, the three stages, and what they say about their choice."""

import math

import models
import pytest
import torch
from models import one_thread  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import sparseft
from sparseft import testing
from sparseft.data import (
    ChosenSamples,
    continual,
    embedding_kernel,
    fisher_kernel,
    instruction_tuning,
    task_specific,
)


def cosine(a, b):
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_embeddings_are_compared_by_their_cosine(dtype, device, monkeypatch):
    monkeypatch.setattr("sparseft.data.kernels._ROWS", 3)
    generator = torch.Generator().manual_seed(0)
    examples = torch.randn(7, 5, generator=generator).to(device, dtype)
    targets = torch.randn(4, 5, generator=generator).to(device, dtype)
    got = embedding_kernel(examples, targets)
    wanted = torch.tensor([[(1 + cosine(a, b)) / 2 for b in targets.tolist()] for a in examples.tolist()])
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    own = embedding_kernel(examples)
    torch.testing.assert_close(own.diagonal(), torch.ones(7))
    assert float(own.max()) <= 1


def test_embeddings_of_any_length():
    rows = torch.tensor([[1e30, 0], [0, 1e-30], [3e-38, 3e-38], [0, 0]])
    half, near = 0.5, (1 + math.sqrt(0.5)) / 2
    wanted = torch.tensor([[1, half, near, half], [half, 1, near, half], [near, near, 1, half], [half] * 4])
    torch.testing.assert_close(embedding_kernel(rows), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_embeddings_may_be_of_numpy(dtype):
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(embedding_kernel(rows.numpy()), embedding_kernel(rows))
    assert torch.equal(embedding_kernel(rows, rows[:2].numpy()), embedding_kernel(rows, rows[:2]))
    with pytest.raises(TypeError, match="targets must be a matrix of torch or numpy, got list"):
        embedding_kernel(rows, rows.tolist())
    with pytest.raises(TypeError, match=r"must be of floating point, got torch\.int64"):
        embedding_kernel(rows.long().numpy())


def test_embeddings_that_are_none_are_refused():
    rows = torch.randn(4, 3)
    rows[2, 1] = torch.inf
    with pytest.raises(ValueError, match=r"those of targets \[2\] are not"):
        embedding_kernel(torch.randn(2, 3), rows)
    with pytest.raises(ValueError, match="of as many features"):
        embedding_kernel(torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises(ValueError, match="of as many features"):
        embedding_kernel(torch.randn(0, 3))
    with pytest.raises(TypeError, match="must be of floating point"):
        embedding_kernel(torch.ones(2, 3, dtype=torch.int64))


def chosen_entries(model):
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.rand(parameter.numel(), generator=generator) < 0.2).nonzero()[:, 0].int()
        for name, parameter in model.named_parameters()
        if "layer.1" in name
    }


def gradients(model, batch, indices):
    """One backward pass a sample, in evaluation mode."""
    model.eval()
    rows = []
    for sample in range(len(batch["labels"])):
        model.zero_grad()
        model(**{key: value[sample : sample + 1] for key, value in batch.items()}).loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        rows.append([x for name, index in indices.items() for x in grads[name].flatten()[index.long()].tolist()])
    model.zero_grad()
    return rows


@pytest.mark.parametrize("squared", [False, True], ids=["gradients", "squares"])
def test_gradients_are_compared_by_their_cosine(squared):
    model = models.make("bert")
    pool, task = models.batch("bert", samples=5), models.batch("bert", samples=3, seed=2)
    indices = chosen_entries(model)
    pairs = [gradients(model, batch, indices) for batch in (pool, task)]
    if squared:
        pairs = [[[x * x for x in row] for row in rows] for rows in pairs]
    wanted = torch.tensor([[(1 + cosine(a, b)) / 2 for b in pairs[1]] for a in pairs[0]])
    options = {"indices": indices, "squared": squared, "progress": False}
    slices = [{key: value[i : i + 2] for key, value in pool.items()} for i in range(0, 5, 2)]
    torch.testing.assert_close(fisher_kernel(model, slices, [task], **options), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fisher_kernel(model, slices, **options).diagonal(), torch.ones(5))


def test_a_mask_says_where_gradients_are_compared():
    model, batch = models.make("bert"), models.batch("bert", samples=4)
    mask = sparseft.select("fish", model, [batch], density=0.02, progress=False)
    rows = gradients(model, batch, dict(mask.items()))
    wanted = torch.tensor([[(1 + cosine(a, b)) / 2 for b in rows] for a in rows])
    got = fisher_kernel(model, [batch], indices=mask, progress=False)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_a_sample_without_a_gradient_is_named():
    model, batch = models.make("bert regression"), models.batch("bert regression", samples=4)
    batch["labels"][2] = torch.nan
    with pytest.raises(ValueError, match=r"examples \[2\] have none"):
        fisher_kernel(model, [batch], indices=chosen_entries(model), progress=False)


def utilities(rows, columns, seed=0):
    """Of both signs, as utilities are."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def best_next(value, n, chosen):
    """The candidate that greedy takes, from the value of sets alone."""
    return max((c for c in range(n) if c not in chosen), key=lambda c: (round(value([*chosen, c]), 9), -c))


def stage_by_definition(name, kernel, other, weight, negative):
    """The set function of a stage, over negative utilities treated as asked, in Python's numbers."""
    least = min(0.0, float(kernel.min()), float(other.min()) if other is not None else 0.0)

    def plain(part):
        return [[max(x, 0.0) if negative == "clip" else x - least for x in row] for row in part.double().tolist()]

    s, t = plain(kernel), plain(other) if other is not None else None
    columns = range(kernel.shape[1])

    def value(chosen):
        reached = [max((s[c][r] for c in chosen), default=0.0) for r in columns]
        if name == "instruction":
            return math.fsum(reached)
        if name == "query":
            return math.fsum(reached) + weight * math.fsum(max(s[c]) for c in chosen)
        limit = [weight * max(row[r] for row in t) for r in columns]
        if name == "pool":
            return math.fsum(min(*pair) for pair in zip(reached, limit, strict=True))
        return math.fsum(max(0.0, a - b) for a, b in zip(reached, limit, strict=True))

    return value


STAGES = {
    "instruction": lambda kernel, other, weight, **more: instruction_tuning(kernel, 6, **more),
    "query": lambda kernel, other, weight, **more: task_specific(kernel, 6, eta=weight, **more),
    "pool": lambda kernel, other, weight, **more: task_specific(kernel, 6, query=other, eta=weight, **more),
    "continual": lambda kernel, other, weight, **more: continual(kernel, 6, known=other, nu=weight, **more),
}


@pytest.mark.parametrize("negative", ["shift", "clip"])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_chooses_what_its_definition_asks_for(name, negative):
    for seed in range(3):
        kernel = utilities(12, 9 if name == "query" else 12, seed)
        other = None if name in ("instruction", "query") else utilities(4, 12, seed + 10)
        found = STAGES[name](kernel, other, 0.8, negative=negative)
        value = stage_by_definition(name, kernel, other, 0.8, negative)
        wanted, gains = [], []
        while len(wanted) < 6:
            wanted.append(best_next(value, 12, wanted))
            gains.append(value(wanted) - value(wanted[:-1]))
        assert found.indices == wanted
        assert found.gains.tolist() == pytest.approx(gains, abs=1e-6)
        assert found.value == pytest.approx(value(wanted), rel=1e-6)
        assert found.info["budget"] == 6


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_takes_a_budget_in_tokens(name, tmp_path):
    kernel = utilities(12, 9 if name == "query" else 12, 0)
    other = None if name in ("instruction", "query") else utilities(4, 12, 10)
    tokens = [2, 1, 3, 1, 2, 4, 1, 3, 2, 1, 2, 3]
    found = STAGES[name](kernel, other, 0.8, costs=tokens)
    value = stage_by_definition(name, kernel, other, 0.8, "shift")
    wanted, left = [], 6  # the budget of STAGES
    while fitting := [c for c in range(12) if c not in wanted and tokens[c] <= left]:
        rates = {c: round((value([*wanted, c]) - value(wanted)) / tokens[c], 9) for c in fitting}
        wanted.append(max(fitting, key=lambda c: (rates[c], -c)))
        left -= tokens[wanted[-1]]
    assert found.indices == wanted
    assert found.info["cost"] == sum(tokens[c] for c in wanted) == 6 - left
    found.save(tmp_path / "chosen.safetensors")
    assert ChosenSamples.load(tmp_path / "chosen.safetensors").info == found.info


def test_copies_count_again_for_a_task_and_nowhere_else():
    one, other = torch.tensor([0.9, 0.8, 0.1]), torch.tensor([0.1, 0.2, 0.7])
    with_task = torch.stack([one, one, other, one])
    chosen = task_specific(with_task, 4)
    assert chosen.indices == [0, 2, 1, 3]
    torch.testing.assert_close(chosen.gains, torch.tensor([2.7, 1.3, 0.9, 0.9], dtype=torch.float64))
    among = with_task[:, [0, 0, 2, 0]]
    for found in (instruction_tuning(among, 4), task_specific(among, 4, query=among)):
        assert set(found.indices[:2]) == {0, 2}
        assert found.gains[2:].tolist() == [0, 0]


def test_a_reason_says_whom_a_sample_stands_for():
    kernel = torch.tensor(
        [
            [0.9, 0.8, 0.1, 0.0, 0.2],
            [0.3, 0.9, 0.2, 0.0, 0.0],
            [0.0, 0.1, 0.7, 0.6, 0.0],
            [0.9, 0.8, 0.1, 0.0, 0.2],  # as the first
            [0.0, 0.0, 0.0, 0.0, 0.0],
        ]
    )
    found = instruction_tuning(kernel, 4)
    assert found.indices == [0, 2, 1, 3]
    assert found.represented_by.tolist() == [0, 2, 1, 1, 0]
    assert [reason.represents for reason in found.reasons] == [2, 2, 1, 0]
    assert [[sample for sample, _ in reason.most] for reason in found.reasons] == [[0, 4], [2, 3], [1], []]
    assert [value for _, value in found.reasons[1].most] == pytest.approx([0.7, 0.6])
    assert str(found.reasons[1]) == "gain 1.2; stands for 2 samples, most of all for 2 (0.7), 3 (0.6)"
    assert str(found.reasons[3]).startswith("gain 0; stands for no sample")
    assert len(instruction_tuning(kernel, 5, stop_at_zero=True)) == 3


def test_what_earlier_samples_stand_for_is_no_reason():
    """Entries in a reason are those of the kernel as it was given, before it was shifted."""
    kernel = torch.tensor([[0.5, 0.4, -0.1], [0.0, 0.6, 0.3], [0.2, 0.0, 0.9]])
    known = torch.tensor([[0.6, 0.1, 0.2]])
    found = continual(kernel, 2, known=known)
    assert found.indices == [2, 1]
    assert found.represented_by.tolist() == [-1, 1, 0]
    assert found.reasons[0].most == [(2, pytest.approx(0.9))]
    assert found.value == pytest.approx(0.5 + 0.7)


def test_they_are_saved_and_loaded(tmp_path):
    path = tmp_path / "chosen.safetensors"
    found = task_specific(utilities(30, 8), 0.4, eta=0.5)
    assert len(found) == 12
    found.save(path)
    again = ChosenSamples.load(path)
    assert again.indices == found.indices
    assert torch.equal(again.gains, found.gains)
    assert torch.equal(again.represented_by, found.represented_by)
    assert (again.value, again.reasons, again.info) == (found.value, found.reasons, found.info)
    assert again.info["eta"] == 0.5
    assert [str(reason) for reason in again.reasons] == [str(reason) for reason in found.reasons]
    data = path.read_bytes()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(ValueError, match="damaged"):
        ChosenSamples.load(path)
    with pytest.raises(FileNotFoundError):
        found.save(tmp_path / "none" / "chosen.safetensors")


def test_chosen_samples_feed_selection_and_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    found = instruction_tuning(embedding_kernel(x), 10)
    assert all(type(index) is int for index in found.indices)
    data = DataLoader(Subset(TensorDataset(x, y), found.indices), batch_size=4)
    mask = sparseft.select("fish", model, data, density=0.2, progress=False)
    same = sparseft.select("fish", model, [(x[found.indices], y[found.indices])], density=0.2, progress=False)
    assert {name: index.tolist() for name, index in mask.items()} == {
        name: index.tolist() for name, index in same.items()
    }


def test_kernels_that_do_not_fit_are_refused():
    kernel = utilities(5, 5)
    with pytest.raises(
        ValueError, match=r"query must be \[task, pool\], with a column for each of the 5 samples of kernel"
    ):
        task_specific(kernel, 2, query=utilities(3, 4))
    with pytest.raises(
        ValueError, match=r"known must be \[earlier samples, pool\].* 5 samples of kernel, got \[3, 4\]$"
    ):
        continual(kernel, 2, known=utilities(3, 4))
    with pytest.raises(ValueError, match=r"got \[5, 3\]; it looks turned around: the columns of known are the pool"):
        continual(kernel, 2, known=utilities(5, 3))
    with pytest.raises(ValueError, match=r"known must .* got \[0, 5\]; use instruction_tuning"):
        continual(kernel, 2, known=utilities(0, 5))
    with pytest.raises(ValueError, match=r"query must .* got \[0, 5\]; a task without samples"):
        task_specific(kernel, 2, query=utilities(0, 5))
    with pytest.raises(ValueError, match="budget must be from 1 to the 5 candidates"):
        instruction_tuning(kernel, 6)
    with pytest.raises(TypeError, match="must be float32"):
        instruction_tuning(kernel.double(), 2)
    for empty in (utilities(5, 0), utilities(0, 5), torch.tensor([])):
        with pytest.raises(ValueError, match="at least one of each"):
            task_specific(empty, 2)
    kernel[1, 2] = torch.nan
    for call in (
        lambda: instruction_tuning(kernel, 2),
        lambda: task_specific(utilities(5, 5), 2, query=kernel),
        lambda: continual(utilities(5, 5), 2, known=kernel),
    ):
        with pytest.raises(
            ValueError, match=r"(kernel|query|known) must be finite, got NaN or infinities in rows \[1\]"
        ):
            call()


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=str)
def test_a_kernel_of_a_task_is_not_one_of_a_pool(shape):
    got = rf"kernel must be square, \[pool, pool\], so \[{shape[0]}, {shape[0]}\] .* got \[{shape[0]}, {shape[1]}\]"
    kernel = utilities(*shape)
    with pytest.raises(ValueError, match=got + ".*goes to task_specific"):
        instruction_tuning(kernel, 2)
    with pytest.raises(ValueError, match=got + ".*goes to task_specific"):
        continual(kernel, 2, known=utilities(4, shape[1]))
    with pytest.raises(ValueError, match=got + ".*is used without query"):
        task_specific(kernel, 2, query=utilities(4, shape[1]))
    assert len(task_specific(kernel, 2)) == 2


@pytest.mark.parametrize("name", STAGES)
def test_errors_speak_of_what_was_given(name):
    kernel, other = utilities(8, 8), utilities(3, 8)
    with pytest.raises(ValueError, match='negative must be "shift" or "clip", got \'abs\''):
        STAGES[name](kernel, other, 1.0, negative="abs")
    with pytest.raises(TypeError, match=r"kernel must be a torch tensor, got ndarray; see torch\.as_tensor"):
        STAGES[name](kernel.numpy(), other, 1.0)
    if name in ("pool", "continual"):
        given = {"pool": "query", "continual": "known"}[name]
        with pytest.raises(TypeError, match=f"{given} must be a torch tensor, got ndarray"):
            STAGES[name](kernel, other.numpy(), 1.0)
        with pytest.raises(TypeError, match=rf"{given} must be float32, got torch\.float64"):
            STAGES[name](kernel, other.double(), 1.0)


def test_what_was_chosen_is_shown_in_one_line():
    found = instruction_tuning(embedding_kernel(torch.rand(300, 4, generator=torch.Generator().manual_seed(0))), 100)
    first = ", ".join(map(str, found.indices[:5]))
    shown = f"ChosenSamples(100 samples: {first}, ...; value {found.value:.4g}, stage instruction_tuning)"
    assert repr(found) == str(found) == shown
    few = task_specific(torch.eye(2), 2)
    assert repr(few) == "ChosenSamples(2 samples: 0, 1; value 4, stage task_specific)"
