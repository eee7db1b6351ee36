"""IRD against an oracle written from the algorithm alone: numpy, sets, and batch-1 autograd."""

import itertools
import math
import sys
from fractions import Fraction

import models
import numpy as np
import pytest
import torch
from models import one_thread  # noqa: F401

import sparseft
from sparseft.selection import IRDPath, ird_search

ROUNDS = {"joint": ["both"], "samples_first": ["samples", "parameters"], "params_first": ["parameters", "samples"]}


def classifier():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(10, 3))


def batches(sizes=(5, 5, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes]


def squares(model, losses):
    """Return G: float64 [N, P], squared gradients of single samples."""
    model.eval()
    rows = []
    for loss in losses(model):
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]).double().square())
    model.train()
    return torch.stack(rows).numpy()


def classifier_squares(data):
    def losses(model):
        for inputs, targets in data:
            for x, y in zip(inputs, targets, strict=True):
                yield torch.nn.functional.cross_entropy(model(x[None]), y[None])

    return squares(classifier(), losses)


class Oracle:
    """Algorithm 1 of the reconstruction, cell by cell: (step, parent, samples, entries, mass, figure)."""

    def __init__(self, table, k, evaluator=None, sizes=None, classes=None, lengths=None, **options):
        self.o = {
            "min_samples": 8,
            "order": "joint",
            "rescore": True,
            "restrict": "nested",
            "sample_score": "selected",
            "select_by": "evaluator",
            "patience": 2,
            "reverse": "no",
            "influence_cap": None,
            **options,
        }
        self.table, self.evaluator, self.classes, self.lengths = table, evaluator, classes, lengths
        self.groups = np.repeat(np.arange(len(sizes)), sizes) if sizes else np.zeros(table.shape[1], int)
        everyone = list(range(len(table)))
        self.start = everyone, self.top(table.sum(0), range(table.shape[1]), self.shares(k, sizes))
        if self.o["influence_cap"]:
            sums = table[:, self.start[1]].sum(1)
            most = self.o["influence_cap"] * np.median(sums)
            self.table = table * np.minimum(1, most / sums)[:, None]
        self.mass = self.table[:, self.start[1]].sum()
        self.least = {g: math.ceil(c / 8) for g, c in self.count(self.start[1]).items()}
        self.cells, self.chosen = [], 0

    def shares(self, k, sizes):
        if not sizes:
            return {0: k}
        exact = [Fraction(int(k * sum(sizes)) * size, sum(sizes)) for size in sizes]
        shares = {g: int(share) for g, share in enumerate(exact)}
        for g in sorted(shares, key=lambda g: shares[g] - exact[g])[: int(k * sum(sizes)) - sum(shares.values())]:
            shares[g] += 1
        return shares

    def count(self, entries):
        return {g: int((self.groups[entries] == g).sum()) for g in np.unique(self.groups)}

    def top(self, values, among, counts, lowest=False):
        kept = []
        for g, count in counts.items():
            own = [j for j in among if self.groups[j] == g]
            kept += sorted(own, key=lambda j: (values[j] if lowest else -values[j], j))[:count]
        return sorted(kept)

    def score(self, samples, entries):
        samples_of, entries_of = (samples, entries) if self.o["rescore"] else self.start
        columns = range(self.table.shape[1]) if self.o["sample_score"] == "all" else entries_of
        found = {i: self.table[i, list(columns)].sum() for i in samples_of}
        return {i: found[i] / (self.lengths[i] if self.lengths else 1) for i in samples}

    def fewer(self, samples, entries):
        score, lowest = self.score(samples, entries), self.o["reverse"] in ("samples", "both")
        ranked = sorted(samples, key=lambda i: (score[i] if lowest else -score[i], i))
        count = min(len(samples), max(self.o["min_samples"], math.ceil(len(samples) / 2)))
        if self.classes is not None:
            taken = []
            while len(taken) < count:
                # the next of the class of which the smallest share was taken; of equals the better ranked
                share = {
                    c: sum(self.classes[i] == c for i in taken) / sum(self.classes[i] == c for i in samples)
                    for c in set(self.classes)
                    if any(self.classes[i] == c for i in samples)
                }
                rest = [i for i in ranked if i not in taken]
                taken.append(min(rest, key=lambda i: (share[self.classes[i]], ranked.index(i))))
            return sorted(taken)
        return sorted(ranked[:count])

    def smaller(self, samples, entries, counts):
        if self.o["restrict"] == "global":
            among = range(self.table.shape[1])
        elif counts == self.count(entries):
            return entries
        else:
            among = entries
        rows = samples if self.o["rescore"] else self.start[0]
        return self.top(self.table[list(rows)].sum(0), among, counts, self.o["reverse"] in ("parameters", "both"))

    def note(self, step, parent, samples, entries):
        figure = self.evaluator(entries) if self.evaluator else None
        mass = self.table[np.ix_(samples, entries)].sum() / self.mass
        self.cells.append((step, parent, samples, entries, mass, figure))
        return len(self.cells) - 1

    def halved(self, entries):
        return {g: min(c, max(self.least[g], math.ceil(c / 2))) for g, c in self.count(entries).items()}

    def move(self, step, at):
        _, _, samples, entries, _, _ = self.cells[at]
        kept = samples if step == "parameters" else self.fewer(samples, entries)
        counts = self.count(entries) if step == "samples" else self.halved(entries)
        if step == "both":
            step = {(True, False): "parameters", (False, True): "samples"}.get(
                (kept == samples, counts == self.count(entries)), "both"
            )
        return self.note(step, at, kept, self.smaller(kept, entries, counts))

    def best(self):
        figures = [cell[4] if cell[5] is None else cell[5] for cell in self.cells]
        return figures.index(max(figures))

    def run(self):
        at = self.note("start", None, *self.start)
        worse, best = 0, 0
        while True:
            _, _, samples, entries, _, _ = self.cells[at]
            few = {"samples": len(self.fewer(samples, entries)) < len(samples)}
            few["parameters"] = self.halved(entries) != self.count(entries)
            few["both"] = all(few.values()) if self.o["order"] == "branch" else any(few.values())
            steps = [s for s in ROUNDS.get(self.o["order"], ["samples", "parameters", "both"]) if few[s]]
            if not steps:
                break
            if self.o["order"] == "branch":
                found = [self.move(step, at) for step in steps]
                worth = [self.cells[n][4] if self.cells[n][5] is None else self.cells[n][5] for n in found]
                at = found[worth.index(max(worth))]
            else:
                for step in steps:
                    at = self.move(step, at)
            if self.evaluator:
                worse = worse + 1 if self.best() == best else 0
                best = self.best()
                if worse == self.o["patience"]:
                    break
        self.chosen = self.best() if self.evaluator else at
        return self

    def grid(self):
        samples, entries = self.start
        rows = [samples]
        while len(rows[-1]) > self.o["min_samples"]:
            following = self.fewer_of_start(len(rows[-1]))
            if following == rows[-1]:
                break
            rows.append(following)
        for kept in rows:
            counts = self.count(entries)
            while True:
                step, parent = ("grid", 0) if self.cells else ("start", None)
                self.note(step, parent, kept, self.smaller(kept, entries, counts))
                halved = {g: min(c, max(self.least[g], math.ceil(c / 2))) for g, c in counts.items()}
                if halved == counts:
                    break
                counts = halved
        self.chosen = self.best() if self.evaluator else len(self.cells) - 1
        return self

    def fewer_of_start(self, count):
        samples, entries = self.start
        score = self.score(samples, entries)
        lowest = self.o["reverse"] in ("samples", "both")
        ranked = sorted(samples, key=lambda i: (score[i] if lowest else -score[i], i))
        return sorted(ranked[: max(self.o["min_samples"], math.ceil(count / 2))])


def flat(mask, model):
    """Return the mask's entries as positions in all parameters laid end to end."""
    found, first = [], 0
    for name, parameter in model.named_parameters():
        if name in mask:
            found += [first + int(i) for i in mask[name]]
        first += parameter.numel()
    return found


def assert_same(path, oracle, model):
    assert len(path.cells) == len(oracle.cells)
    for number, (cell, mask, expected) in enumerate(zip(path.cells, path.masks, oracle.cells, strict=True)):
        step, parent, samples, entries, mass, figure = expected
        assert (cell.step, cell.parent) == (step, parent), number
        assert list(cell.positions) == samples, number
        assert flat(mask, model) == entries, number
        assert cell.parameters == len(entries)
        assert cell.fisher_mass == pytest.approx(mass, rel=1e-4), number
        assert cell.figure == figure, number
    assert path.chosen == oracle.chosen


def liking(model, seed=0):
    """An evaluator with tastes of its own: of masks, and the same of the oracle's entries."""
    taste = np.random.default_rng(seed).normal(size=sum(p.numel() for p in model.parameters()))

    def of_entries(entries):
        return float(taste[sorted(entries)].mean())

    return (lambda mask: of_entries(flat(mask, model))), of_entries


@pytest.mark.parametrize("order", ["joint", "samples_first", "params_first", "branch"])
@pytest.mark.parametrize("restrict", ["nested", "global"])
@pytest.mark.parametrize("rescore", [True, False])
@pytest.mark.parametrize("select_by", ["evaluator", "fisher_mass"])
def test_every_order_walks_as_the_algorithm_says(order, restrict, rescore, select_by):
    model, data = classifier(), batches()
    options = {"order": order, "restrict": restrict, "rescore": rescore, "select_by": select_by}
    options |= {"min_samples": 2, "patience": 4}
    of_mask, of_entries = liking(model) if select_by == "evaluator" else (None, None)
    oracle = Oracle(classifier_squares(data), 41, of_entries, **options).run()
    path = ird_search(model, data, k=41, samples=13, progress=False, evaluator=of_mask, **options)
    assert_same(path, oracle, model)
    assert len(path.cells) > 3


@pytest.mark.parametrize("reverse", ["samples", "parameters", "both"])
@pytest.mark.parametrize("order", ["joint", "branch"])
def test_reverse_keeps_the_lowest(reverse, order):
    model, data = classifier(), batches()
    options = {"order": order, "reverse": reverse, "select_by": "fisher_mass", "min_samples": 2}
    oracle = Oracle(classifier_squares(data), 40, **options).run()
    assert_same(ird_search(model, data, k=40, samples=13, progress=False, **options), oracle, model)


@pytest.mark.parametrize("restrict", ["nested", "global"])
@pytest.mark.parametrize("judged", [True, False])
def test_the_grid_holds_every_cell(restrict, judged):
    model, data = classifier(), batches()
    options = {"order": "grid", "restrict": restrict, "select_by": "evaluator" if judged else "ladder"}
    of_mask, of_entries = liking(model) if judged else (None, None)
    oracle = Oracle(classifier_squares(data), 41, of_entries, min_samples=2, **options).grid()
    path = ird_search(model, data, k=41, samples=13, min_samples=2, progress=False, evaluator=of_mask, **options)
    assert_same(path, oracle, model)
    counts = [41, 21, 11, 6]
    assert [(c.samples, c.parameters) for c in path.cells] == list(itertools.product([13, 7, 4, 2], counts))


@pytest.mark.parametrize(
    "options",
    [
        {"sample_score": "all"},
        {"influence_cap": 1.0},
        {"influence_cap": 0.5, "sample_score": "all"},
        {"class_balance": True},
        {"class_balance": True, "reverse": "samples"},
        {"patience": 1},
    ],
    ids=str,
)
def test_options_of_the_sample_score(options):
    model, data = classifier(), batches()
    classes = torch.cat([targets for _, targets in data]).tolist() if options.get("class_balance") else None
    expected = {key: value for key, value in options.items() if key != "class_balance"}
    of_mask, of_entries = liking(model, 3)
    oracle = Oracle(classifier_squares(data), 41, of_entries, classes=classes, min_samples=2, **expected).run()
    path = ird_search(model, data, k=41, samples=13, min_samples=2, progress=False, evaluator=of_mask, **options)
    assert_same(path, oracle, model)


def test_a_cap_changes_the_entries_that_one_sample_would_choose():
    model, data = classifier(), batches()
    data[0][0][2] *= 1000
    plain, capped = (
        ird_search(model, data, k=20, samples=13, progress=False, order="grid", select_by="ladder", influence_cap=cap)
        for cap in (None, 1.0)
    )
    assert plain.masks[1] != capped.masks[1]


@pytest.mark.parametrize(
    "options",
    [{"order": "grid"}, {"order": "samples_first", "min_density": 20 / 103}, {"order": "grid", "memory_limit": 0}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*memory_limit")
def test_capped_samples_tie_and_the_first_stay(options):
    options = {"select_by": "ladder", "min_samples": 2, "influence_cap": 1e-3, **options}
    path = ird_search(classifier(), batches(), k=20, samples=13, progress=False, **options)
    # the cap lies below every sample, so all have one score: rounding must not decide
    assert {cell.positions for cell in path.cells} == {tuple(range(count)) for count in (13, 7, 4, 2)}
    assert path.mask.info["capped"] == list(range(13))


def test_a_mask_names_the_samples_that_were_capped():
    table = classifier_squares(batches())
    options = {"k": 20, "samples": 13, "select_by": "ladder", "progress": False}
    path = ird_search(classifier(), batches(), influence_cap=1.5, **options)
    sums = table[:, Oracle(table, 20).start[1]].sum(1)
    wanted = np.flatnonzero(sums > 1.5 * np.median(sums)).tolist()
    assert path.mask.info["capped"] == wanted
    assert 0 < len(wanted) < 6
    assert ird_search(classifier(), batches(), **options).mask.info["capped"] == []


def test_length_normalisation_divides_by_the_tokens_of_a_sample():
    model, batch = models.make("bert"), models.batch("bert", samples=9)

    def losses(model):
        for i in range(9):
            yield model(**{key: value[i : i + 1] for key, value in batch.items()}).loss

    table, lengths = squares(model, losses), batch["attention_mask"].sum(1).tolist()
    options = {"select_by": "ladder", "min_samples": 2}
    path = ird_search(model, [batch], k=100, samples=9, progress=False, length_normalisation=True, **options)
    oracle = Oracle(table, 100, lengths=lengths, **options).run()
    assert_same(path, oracle, model)
    plain = ird_search(model, [batch], k=100, samples=9, progress=False, **options)
    assert [cell.positions for cell in plain.cells] != [cell.positions for cell in path.cells]


def test_groups_and_units_it_does_not_search_are_refused():
    model, data = classifier(), batches()
    with pytest.raises(ValueError, match="scope 'global' or 'tensor', got 'row'"):
        sparseft.select("ird", model, data, 0.4, scope="row")
    with pytest.raises(ValueError, match="leave per_group, structure and block out"):
        sparseft.select("ird", model, data, 0.4, structure="row")


def test_each_parameter_by_itself():
    model, data = classifier(), batches()
    sizes = [p.numel() for p in model.parameters()]
    for order in ("joint", "grid"):
        options = {"order": order, "select_by": "ladder", "min_samples": 2}
        oracle = Oracle(classifier_squares(data), 0.4, sizes=sizes, **options)
        oracle = oracle.grid() if order == "grid" else oracle.run()
        path = ird_search(model, data, 0.4, samples=13, progress=False, scope="tensor", **options)
        assert_same(path, oracle, model)


@pytest.mark.parametrize(
    "options", [{"order": "joint"}, {"order": "grid"}, {"order": "branch", "sample_score": "all"}]
)
def test_above_the_memory_limit_the_path_is_the_same(options):
    model, data = classifier(), batches()
    of_mask, _ = liking(model)
    arguments = {"k": 41, "samples": 13, "min_samples": 2, "progress": False, "evaluator": of_mask, **options}
    in_memory = ird_search(model, data, **arguments, memory_limit=13 * 41 * 4)
    with pytest.warns(UserWarning, match="above the memory_limit"):
        again = ird_search(model, data, **arguments, memory_limit=13 * 41 * 4 - 1)
    assert "run again for every cell" in str(again)
    assert "one table of 13 samples x 41 entries" in str(in_memory)
    assert again.masks == in_memory.masks
    for one, other in zip(in_memory.cells, again.cells, strict=True):
        assert one.positions == other.positions
        assert one.fisher_mass == pytest.approx(other.fisher_mass, rel=1e-5)
        assert (one.step, one.parent, one.figure, one.chosen) == (other.step, other.parent, other.figure, other.chosen)


@pytest.mark.parametrize(("size", "kept"), [(1, [1]), (2, [2, 1]), (3, [3, 2, 1]), (7, [7, 4, 2, 1])])
def test_any_number_of_samples_down_to_one(size, kept):
    model, data = classifier(), batches((size,))
    options = {"select_by": "ladder", "min_samples": 1, "min_density": 0.3, "progress": False}
    path = ird_search(model, data, 0.3, samples=100, **options)
    assert [cell.samples for cell in path.cells] == kept
    assert {cell.parameters for cell in path.cells} == {int(0.3 * 103)}


def test_samples_that_are_the_same_tie_and_the_first_stays():
    (inputs, targets), *_ = batches((6,))
    data = [(torch.cat([inputs, inputs]), torch.cat([targets, targets]))]
    path = ird_search(classifier(), data, k=20, samples=12, min_samples=1, progress=False, select_by="ladder")
    table = classifier_squares([(inputs, targets)])
    oracle = Oracle(np.concatenate([table, table]), 20, select_by="ladder", min_samples=1).run()
    # rounding must not decide between copies: of the last two samples, the first of the pair is kept
    assert path.cells[-2].positions == (oracle.cells[-2][2][0], oracle.cells[-2][2][1])
    assert len(path.cells[-1].positions) == 1
    assert path.cells[-1].positions[0] < 6


def test_entries_shrink_to_the_density_asked():
    path = ird_search(
        classifier(), batches(), 0.5, min_density=0.03, min_samples=13, progress=False, select_by="ladder"
    )
    assert [cell.parameters for cell in path.cells] == [51, 26, 13, 7, 4, 3]
    assert {cell.step for cell in path.cells[1:]} == {"parameters"}


def test_samples_that_are_not_finite_are_left_out():
    model = torch.nn.Linear(4, 1)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(9, 4, generator=generator), torch.randn(9, 1, generator=generator)
    targets[3] = float("nan")
    data = [(inputs, targets)]
    path = ird_search(model, data, k=4, samples=9, min_samples=2, progress=False, select_by="ladder", max_dropped=0.2)
    assert path.mask.info["dropped"] == [3]
    assert path.cells[0].positions == (0, 1, 2, 4, 5, 6, 7, 8)
    with pytest.raises(ValueError, match="may lack a finite loss"):
        ird_search(model, data, k=4, samples=9, progress=False, select_by="ladder")


def test_the_default_evaluator_sees_samples_of_its_own_and_leaves_the_model_alone():
    model, data = classifier(), batches((6, 6, 6, 6))
    before = {name: p.clone() for name, p in model.named_parameters()}
    options = {"samples": 16, "min_samples": 2, "progress": False, "trial_steps": 5}
    path = ird_search(model, data, 0.2, dense="3.*", **options)
    assert path.mask.info["held_out"] == list(range(16, 22))
    assert path.cells[0].positions == tuple(range(16))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training
    figures = [cell.figure for cell in path.cells]
    assert path.cells[path.chosen].figure == max(figures)
    again = ird_search(model, data, 0.2, dense="3.*", **options)
    assert [cell.figure for cell in again.cells] == figures
    # by hand: the same mask, trained and measured the plain way
    plain = classifier().eval()
    chosen = [p for name, p in plain.named_parameters()]
    masks = {name: torch.zeros(p.numel(), dtype=torch.bool) for name, p in plain.named_parameters()}
    for name in masks:
        if name in path.mask:
            masks[name][path.mask[name].long()] = True
        elif name in path.mask.dense:
            masks[name][:] = True
    optimizer = torch.optim.AdamW(chosen, lr=3e-3, weight_decay=0.0)
    loss = torch.nn.functional.cross_entropy
    for inputs, targets in [data[0], data[1], (data[2][0][:4], data[2][1][:4]), data[0], data[1]]:
        optimizer.zero_grad()
        loss(plain(inputs), targets).backward()
        for name, p in plain.named_parameters():
            p.grad.view(-1)[~masks[name]] = 0
        optimizer.step()
    rest = torch.cat([data[2][0][4:], data[3][0][:4]]), torch.cat([data[2][1][4:], data[3][1][:4]])
    assert path.cells[path.chosen].figure == pytest.approx(-loss(plain(rest[0]), rest[1]).item(), rel=1e-4)


def test_scarce_data_are_shared_out():
    path = ird_search(classifier(), batches((8,)), 0.2, samples=100, progress=False, held_out=0.25, trial_steps=1)
    assert path.cells[0].samples == 6
    assert path.mask.info["held_out"] == [6, 7]
    with pytest.raises(ValueError, match="samples to hold out, got 1"):
        ird_search(classifier(), batches((1,)), 0.2, progress=False)


def test_labels_drawn_from_the_model_stay_the_same_in_every_pass():
    model, data = classifier(), batches()
    options = {"k": 41, "samples": 13, "min_samples": 2, "progress": False, "select_by": "ladder", "seed": 5}
    for mode in ("sampled", "expected"):
        path = ird_search(model, data, mode=mode, **options)
        with pytest.warns(UserWarning, match="memory_limit"):
            assert ird_search(model, data, mode=mode, memory_limit=0, **options).masks == path.masks
        scores = sparseft.estimate_fisher(model, data, mode=mode, seed=5, progress=False)
        assert path.masks[0] == sparseft.top_k(scores, k=41)


def test_the_path_travels_with_the_mask(tmp_path):
    model, data = classifier(), batches()
    of_mask, _ = liking(model)
    arguments = {"k": 41, "samples": 13, "min_samples": 2, "progress": False, "evaluator": of_mask}
    path = ird_search(model, data, **arguments)
    mask = sparseft.select("ird", model, data, **arguments)
    assert mask == path.mask
    assert mask.info["method"] == "ird"
    assert mask.info["samples"] == path.cells[path.chosen].samples
    assert mask.info["options"] == {"samples": 13, "min_samples": 2, "evaluator": "given by the caller"}
    mask.save(tmp_path / "mask.safetensors")
    loaded = IRDPath.of(sparseft.Mask.load(tmp_path / "mask.safetensors"))
    assert loaded == path
    assert str(loaded) == str(path)
    with pytest.raises(ValueError, match="holds no masks"):
        loaded.mask  # noqa: B018
    with pytest.raises(ValueError, match="must come from method 'ird'"):
        IRDPath.of(sparseft.select("random", model, k=5))
    with pytest.raises(TypeError, match=r"mask must be a sparseft\.Mask, got NoneType"):
        IRDPath.of(None)


def test_the_path_as_a_table():
    model, data = classifier(), batches()
    path = ird_search(model, data, k=40, samples=13, min_samples=4, progress=False, select_by="ladder")
    lines = str(path).splitlines()
    assert lines[0].split() == "cell from step samples parameters density Fisher mass figure".split()
    assert lines[1].split() == ["0", "start", "13", "40", "38.8350%", "100.0%"]
    assert [line.split()[0] for line in lines[1:5]] == ["0", "1", "2", "*3"]
    assert lines[4].split()[1:5] == ["2", "parameters", "4", "5"]


def test_the_path_as_a_picture(tmp_path, monkeypatch):
    path = ird_search(classifier(), batches(), k=40, samples=13, progress=False, order="grid", select_by="ladder")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(RuntimeError, match="needs matplotlib"):
            path.plot(tmp_path / "path.png")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; make it first"):
        path.plot(tmp_path / "nowhere" / "path.png")
    pytest.importorskip("matplotlib")
    for name in ("path.png", "path.svg"):
        path.plot(tmp_path / name)
    assert (tmp_path / "path.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "path.svg").read_text()
    assert text.count("<use ") >= len(path.cells)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "zigzag"}, "order must be one of samples_first"),
        ({"reverse": True}, "reverse must be one of no"),
        ({"order": "branch", "select_by": "ladder"}, "needs something to choose by"),
        ({"select_by": "ladder", "evaluator": len}, "goes with select_by='evaluator'"),
        ({"restrict": "global", "reverse": "both"}, "need restrict='nested'"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"held_out": 1.0}, r"held_out must be a share in \(0, 1\)"),
        ({"influence_cap": 0.0}, "influence_cap must be positive"),
        ({"memory_limit": -1}, "memory_limit must be"),
        ({"min_density": 0.9, "select_by": "ladder"}, "min_density must lie in"),
        ({"length_normalisation": True, "select_by": "ladder"}, "needs an attention mask"),
        ({"evaluator": lambda mask: math.nan}, r"evaluator must return a finite number, got nan for Mask\(ird"),
        (
            {"evaluator": lambda mask: -math.inf},
            "got -inf for .*; return the worst figure there is for a run that div",
        ),
        (
            {"trial_lr": 3e37},
            r"must measure a finite loss .*, got (nan|inf) at trial_lr=3e\+37; choose a lower trial_lr",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sparseft.select("ird", classifier(), batches(), 0.3, progress=False, **options)


def test_unknown_options_and_missing_data_are_named():
    with pytest.raises(TypeError, match=r"evaluator must return a number, got None; return the figure of the mask"):
        sparseft.select("ird", classifier(), batches(), 0.3, progress=False, evaluator=lambda mask: None)
    with pytest.raises(TypeError, match=r"method 'ird' has no option sample; it has .*min_samples"):
        sparseft.select("ird", classifier(), batches(), 0.3, sample=5)
    with pytest.raises(ValueError, match="needs data"):
        sparseft.select("ird", classifier(), None, 0.3)
    data = [(torch.randn(8, 6), torch.randn(8, 3))]
    with pytest.raises(ValueError, match="one integer label"):
        sparseft.select("ird", classifier(), data, 0.3, select_by="ladder", class_balance=True, progress=False)
