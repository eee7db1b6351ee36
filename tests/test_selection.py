"""Each method selects what its definition says, computed here by other means."""

import re
import warnings

import numpy as np
import pytest
import torch
from tqdm import tqdm

import sparseft
from sparseft.fisher import estimate_fisher, sample_gradients
from sparseft.selection import METHODS, watched


def classifier():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(30, 4))


def batches(sizes=(8, 8, 5)):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 20, generator=generator), torch.randint(0, 4, (n,), generator=generator)) for n in sizes]


def per_sample_gradients(model, data):
    """Return the gradients of single samples, flattened over all parameters: [N, P]."""
    model.eval()
    rows = []
    for inputs, targets in data:
        for x, y in zip(inputs, targets, strict=True):
            loss = torch.nn.functional.cross_entropy(model(x[None]), y[None])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def chosen(mask, model):
    """Return which of all entries a mask holds: bool [P]."""
    parts = []
    for name, parameter in model.named_parameters():
        part = torch.zeros(parameter.numel(), dtype=torch.bool)
        if name in mask:
            part[mask[name].long()] = True
        parts.append(part)
    return torch.cat(parts)


def test_fish_takes_the_largest_mean_squared_per_sample_gradients():
    model, data = classifier(), batches()
    mask = sparseft.select("fish", model, data, k=50, samples=13)
    scores = per_sample_gradients(classifier(), data)[:13].square().mean(0)
    assert torch.equal(chosen(mask, model), scores >= scores.sort().values[-50])
    assert mask.info["samples"] == 13
    assert mask.info["options"] == {"samples": 13}


def test_sift_takes_the_largest_gradients_of_the_first_batches():
    model, data = classifier(), batches()
    mask = sparseft.select("sift", model, data, k=50, batches=2, scope="global")
    scores = per_sample_gradients(classifier(), data[:2]).mean(0).abs()
    assert torch.equal(chosen(mask, model), scores >= scores.sort().values[-50])


def test_sift_ranks_each_tensor_by_itself_unless_told_otherwise():
    model = classifier()
    mask = sparseft.select("sift", model, batches(), density=0.1)
    assert {name: index.numel() for name, index in mask.items()} == {
        "0.weight": 60, "0.bias": 3, "3.weight": 12
    }  # fmt: skip
    assert mask.k == int(0.1 * mask.n)  # a tenth of four biases is none


def test_random_depends_on_the_seed_alone():
    first, again, other = (sparseft.select("random", classifier(), density=0.1, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert abs(first.overlap(other) - 0.1) < 0.1


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_the_model_as_it_was(name):
    budget = {} if name == "bitfit" else {"density": 0.1}
    options = {"objective": "task"} if name == "gps" else {}
    model = classifier()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model[3].bias.requires_grad_(False)
    sparseft.select(name, model, batches(), **budget, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not model[3].bias.requires_grad
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[0].bias.grad is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fish", {}),
        ("sift", {}),
        ("snip", {}),
        ("gps", {"objective": "task"}),
        ("child_tuning", {}),
        ("child_tuning", {"fisher": "batch"}),
    ],
)
def test_data_that_cannot_choose_is_refused(name, options):
    model = classifier()
    with pytest.raises(ValueError, match="at least one"):
        sparseft.select(name, model, [], density=0.1, **options)
    with pytest.raises(ValueError, match="labels"):
        sparseft.select(name, model, [(torch.randn(3, 20),)], density=0.1, **options)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises((ValueError, RuntimeError), match="finite"):
        sparseft.select(name, model, batches(), density=0.1, **options)


def test_samples_that_are_not_finite_are_left_out_and_counted():
    data = batches()
    data[0][0][3, 0] = float("nan")
    mask = sparseft.select("fish", classifier(), data, k=50)
    assert mask.info["dropped"] == [3]
    assert mask.info["samples"] == 20


class Reversed(torch.nn.Module):
    """Runs its first layer on the samples in another order, which no rule follows."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(20, 30), torch.nn.Linear(30, 4)

    def forward(self, x):
        return self.last(self.first(x.flip(0)).flip(0).tanh())


def fisher_of(model):
    return estimate_fisher(model, batches()).report.fallback


def gradients_of(model):
    indices = {name: torch.arange(p.numel()) for name, p in model.named_parameters()}
    return sample_gradients(model, batches(), indices).report.fallback


def chosen_by(name, options):
    def select(model):
        return sparseft.select(name, model, batches(), k=50, progress=False, **options).info["fallback"]

    return select


@pytest.mark.parametrize(
    "function",
    [
        fisher_of,
        gradients_of,
        chosen_by("fish", {}),
        chosen_by("child_tuning", {}),
        chosen_by("ird", {"samples": 16, "select_by": "ladder"}),
        # the same samples are run again for every cell
        chosen_by("ird", {"samples": 16, "select_by": "ladder", "restrict": "global", "sample_score": "all"}),
    ],
)
def test_the_slow_path_is_warned_of_once_and_recorded(function):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fallback = function(Reversed())
    assert set(fallback) == {"first.weight", "first.bias"}
    assert len(found) == 1
    text = str(found[0].message)
    assert text.startswith("2 of 4 parameters take the slow path")
    assert all(f"{name} ({reason})" in text for name, reason in fallback.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert function(classifier()) == {}


def test_a_long_list_of_parameters_on_the_slow_path_is_cut():
    model = torch.nn.Sequential(*[Reversed().first if n == 0 else torch.nn.Linear(30, 30) for n in range(5)])
    whole = torch.nn.Sequential(model, torch.nn.Linear(30, 4))
    forward = model.forward
    model.forward = lambda x: forward(x.flip(0)).flip(0)
    with pytest.warns(UserWarning, match=r"^10 of 12 parameters .* \(.*\), \.\.\.; ") as found:
        assert len(fisher_of(whole)) == 10
    assert len(re.findall(r"0\.\d\.(?:weight|bias)", str(found[0].message))) == 3


def test_what_took_the_slow_path_is_saved_with_the_mask(tmp_path):
    with pytest.warns(UserWarning, match="first.weight"):
        mask = sparseft.select("fish", Reversed(), batches(), k=50)
    mask.save(tmp_path / "mask")
    assert sparseft.Mask.load(tmp_path / "mask").info["fallback"] == mask.info["fallback"] != {}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random", {"k": 5.5}, r"k must be a whole number, got 5\.5"),
        ("random", {"k": "5"}, "k must be a whole number, got '5'"),
        ("random", {"k": True}, "k must be a whole number, got True"),
        ("ird", {"k": 5.5}, r"k must be a whole number, got 5\.5"),
        ("random", {"density": True}, "density must be a number in .*, got True"),
        ("random", {"density": "0.1"}, "density must be a number in .*, got '0.1'"),
        ("random", {"k": 5, "seed": "a"}, "seed must be a whole number, got 'a'"),
        ("ird", {"k": 5, "seed": 0.5}, r"seed must be a whole number, got 0\.5"),
        ("sift", {"k": 5, "batches": 1.5}, r"batches must be a whole number, got 1\.5"),
        ("snip", {"k": 5, "batches": None}, "batches must be a whole number, got None"),
        ("fish", {"k": 5, "samples": 1.5}, r"samples must be a whole number, or None for all, got 1\.5"),
        ("wanda", {"k": 5, "samples": 1.5}, r"samples must be a whole number, or None for all, got 1\.5"),
        ("gps", {"k": 5, "samples": True}, "samples must be a whole number, or None for all, got True"),
        ("child_tuning", {"k": 5, "samples": "9"}, "samples must be a whole number, or None for all, got '9'"),
        ("ird", {"k": 5, "samples": 1.5}, r"samples must be a whole number, got 1\.5"),
        ("ird", {"k": 5, "patience": None}, "patience must be a whole number, got None"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(name, options, message):
    with pytest.raises(TypeError, match=message):
        sparseft.select(name, classifier(), batches(), **options)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_model_is_refused(name):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got OrderedDict"):
        sparseft.select(name, classifier().state_dict(), batches(), k=5)


@pytest.mark.parametrize("name", ["magnitude", "bitfit"])
def test_none_is_no_pattern(name):
    model = torch.nn.Linear(6, 4)
    density = None if name == "bitfit" else 0.5
    assert sparseft.select(name, model, density=density, dense=None) == sparseft.select(name, model, density=density)


def test_a_method_is_a_name():
    with pytest.raises(TypeError, match=r"must be given by name, before the model, got Sequential$"):
        sparseft.select(classifier(), "fish", batches(), k=5)


def test_whole_numbers_of_numpy_are_whole_numbers():
    mask = sparseft.select("sift", classifier(), batches(), k=np.int64(5), batches=np.int32(2), seed=np.int64(3))
    assert mask.k == 5
    assert mask.info["samples"] == 16


@pytest.mark.parametrize(
    ("name", "options", "counted"),
    [
        ("sift", {"batches": 2}, "Gradients: 100%.* 2/2 "),
        ("snip", {"batches": 9}, "Gradients: 100%.* 3/3 "),
        ("gps", {"objective": "task", "samples": 13}, "Gradients: 100%.* 13/13 "),
        ("child_tuning", {"fisher": "batch", "samples": None}, "Gradients: 21sample"),
        ("wanda", {"samples": 10}, "Inputs: 100%.* 10/10 "),
    ],
)
def test_methods_that_take_long_show_a_bar(name, options, counted, monkeypatch, capsys):
    waits = []

    def at_once(**given):
        waits.append(given.pop("delay"))
        return tqdm(**given, mininterval=0)

    monkeypatch.setattr(watched, "tqdm", at_once)
    sparseft.select(name, classifier(), batches(), k=5, progress=False, **options)
    assert capsys.readouterr().err == ""
    sparseft.select(name, classifier(), batches(), k=5, **options)
    assert re.search(counted, capsys.readouterr().err)
    assert waits == [2, 2]  # seconds until it appears


def test_a_bar_counts_no_more_samples_than_a_data_set_holds(monkeypatch):
    totals = []
    monkeypatch.setattr(watched, "tqdm", lambda **given: totals.append(given["total"]) or tqdm(disable=True))
    inputs, targets = batches()[0]
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=3)
    for samples in (5, 100, None):
        sparseft.select("wanda", classifier(), data, k=5, samples=samples)
    assert totals == [5, 8, 8]
