"""Scopes and structures, against groups labelled entry by entry and budgets divided in exact fractions."""

from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers

import sparseft
from sparseft import testing
from sparseft.selection import Layout, layouts

SHAPES = {
    "embed.weight": (7, 5),
    "encoder.layer.0.weight": (6, 9),
    "encoder.layer.0.bias": (6,),
    "encoder.layer.1.weight": (4, 6),
    "encoder.layer.1.conv.weight": (4, 3, 2, 3),
    "encoder.layer.10.bias": (1,),
    "scale": (),
    "head.weight": (3, 4),
}
SCOPES = ["global", "layer", "tensor", "row", "column", "block"]


def random_scores(seed, dtype=torch.float32, distinct=None, device="cpu"):
    """Return scores; with `distinct` values there are many ties."""
    generator = torch.Generator().manual_seed(seed)

    def one(shape):
        if distinct is None:
            return torch.rand(shape, generator=generator) + 0.01
        return torch.randint(1, distinct + 1, shape, generator=generator).float()

    return {name: one(shape).to(device, dtype) for name, shape in SHAPES.items()}


def label(name, position, scope, block):
    """Return which group an entry is in."""
    if scope == "global":
        return ()
    if scope == "layer":
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        return tuple(parts[: numbers[0] + 1]) if numbers else ()
    if scope == "tensor" or len(position) < 2:
        return (name,)
    row, column = position[:2]
    if scope == "block":
        return name, row // block[0], column // block[1]
    return name, row if scope == "row" else column


def divide(total, sizes, key=lambda group: 0):
    """Divide by largest remainders: ties by key, the largest first, then by order. sizes: group -> size."""
    whole = sum(sizes.values())
    exact = {group: Fraction(total * size, whole) for group, size in sizes.items()}
    counts = {group: int(share) for group, share in exact.items()}
    order = sorted(sizes, key=lambda group: (counts[group] - exact[group], -key(group)))  # stable
    for group in order[: total - sum(counts.values())]:
        counts[group] += 1
    return counts


def groups_of(scores, scope, block):
    """Return group -> [(score, name, flat position)], best first, in the order of groups' numbers."""
    groups = defaultdict(list)
    for name, score in scores.items():
        flat = score.double().flatten().tolist()
        for number, position in enumerate(np.ndindex(*score.shape)):
            groups[label(name, position, scope, block)].append((flat[number], name, number))
    order = list(scores)
    ranked = {
        group: sorted(entries, key=lambda entry: (-entry[0], order.index(entry[1]), entry[2]))
        for group, entries in groups.items()
    }
    if scope == "block":
        # numbered by row, then column, whatever entry comes first
        return {group: ranked[group] for group in sorted(ranked, key=lambda group: (order.index(group[0]), group[1:]))}
    return ranked


def expected(scores, total, scope, block=None, per_group=None):
    groups = groups_of(scores, scope, block)
    if per_group is not None:
        counts = {group: min(per_group, len(entries)) for group, entries in groups.items()}
    elif scope in ("global", "layer", "tensor"):
        counts = divide(total, {group: len(entries) for group, entries in groups.items()})
    else:
        counts = {}
        by_tensor = divide(total, {name: score.numel() for name, score in scores.items()})
        for name, share in by_tensor.items():
            mine = {group: len(entries) for group, entries in groups.items() if group[0] == name}
            floors = {group: share * size // sum(mine.values()) for group, size in mine.items()}
            following = {
                group: groups[group][floors[group]][0] if floors[group] < size else 0 for group, size in mine.items()
            }
            counts |= divide(share, mine, following.__getitem__)
    return {(name, number) for group, entries in groups.items() for _, name, number in entries[: counts[group]]}


def entries(mask):
    return {(name, int(i)) for name, index in mask.items() for i in index}


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_scope_takes_the_best_of_each_group_and_exactly_k(scope, dtype, device):
    total = sum(score.numel() for score in random_scores(0).values())
    for distinct in (None, 2):
        for k in (1, 2, 17, 60, 131, total - 1, total):
            scores = random_scores(k, dtype, distinct, device)
            for block in ((2, 3), (4, 4), (1, 5), (9, 9)) if scope == "block" else (None,):
                mask = sparseft.top_k(scores, k=k, scope=scope, block=block)
                assert mask.k == k
                assert entries(mask) == expected(scores, k, scope, block), (k, distinct, block)


@pytest.mark.parametrize("scope", SCOPES[1:])
@pytest.mark.parametrize("per_group", [1, 2, 5, 1000])
def test_so_many_in_every_group(scope, per_group):
    block = (2, 2) if scope == "block" else None
    for distinct in (None, 2):
        scores = random_scores(1, distinct=distinct)
        mask = sparseft.top_k(scores, per_group=per_group, scope=scope, block=block)
        assert entries(mask) == expected(scores, None, scope, block, per_group)


def test_two_of_four_is_a_block_of_one_row_and_four_columns():
    scores = {"w": torch.rand(6, 16)}
    kept = torch.zeros(6 * 16)
    kept[sparseft.top_k(scores, per_group=2, scope="block", block=(1, 4))["w"].long()] = 1
    assert torch.equal(kept.view(-1, 4).sum(1), torch.full((24,), 2.0))


def test_a_density_is_the_budget_of_all_groups_together():
    scores = random_scores(2)
    total = sum(score.numel() for score in scores.values())
    for scope in SCOPES:
        mask = sparseft.top_k(scores, 0.2, scope=scope, block=3 if scope == "block" else None)
        assert mask.k == int(0.2 * total)


def test_parameters_without_scores_count_in_the_density():
    for scope in SCOPES[:4]:
        mask = sparseft.top_k({"a": torch.rand(5, 4), "c": torch.rand(6)}, 0.3, scope=scope, unscored={"b": (10, 2)})
        assert (mask.k, mask.n) == (13, 46)
        assert set(mask) == {"a", "c"}
    with pytest.raises(
        ValueError, match=r"the 4 selectable entries, got 0.5, which is 12, 8 too many; b and the like"
    ):
        sparseft.top_k({"a": torch.rand(4)}, 0.5, unscored={"b": (10, 2)})


@pytest.mark.parametrize(
    "options", [{"scope": scope} for scope in SCOPES[:5]] + [{"structure": "row"}, {"scope": "block", "block": 2}]
)
def test_parameters_without_entries_are_passed_over(options):
    scores = {"none": torch.rand(0, 3), "w": torch.rand(4, 5), "nothing": torch.rand(0)}
    mask = sparseft.top_k(scores, k=10, **options)
    assert (mask.k, list(mask), list(mask.shapes)) == (10, ["w"], ["none", "w", "nothing"])


def test_equal_rows_differ_by_one_entry_at_most():
    mask = sparseft.top_k({"w": torch.rand(1000, 37)}, 0.1, scope="row")
    counts = torch.bincount(mask["w"].long() // 37, minlength=1000)
    assert set(counts.tolist()) == {3, 4}
    assert counts.sum() == 3700


def test_many_rows_of_a_larger_matrix():
    """More entries than are looked at together, in another layout too; no two scores are the same."""
    scores = torch.randperm(3000 * 1001, generator=torch.Generator().manual_seed(0)).view(3000, 1001).float()
    best = scores.topk(2, dim=1).indices.sort(1).values
    rows = sparseft.top_k({"w": scores}, per_group=2, scope="row")["w"]
    assert torch.equal(rows.long(), (best + torch.arange(3000)[:, None] * 1001).flatten())
    turned = {"w": Layout((1001, 3000), (1,), (0,))}
    mask = sparseft.top_k({"w": scores.T.contiguous()}, per_group=2, scope="row", layouts=turned)
    assert torch.equal(mask["w"].long(), (best * 3000 + torch.arange(3000)[:, None]).flatten().sort().values)


class Experts(torch.nn.Module):
    def __init__(self, transposed):
        super().__init__()
        self.is_transposed = transposed
        self.weight = torch.nn.Parameter(torch.randn(3, 4, 5))


@pytest.mark.parametrize(
    ("module", "neuron", "source"),
    [
        (torch.nn.Linear(5, 4), lambda o, i: o, lambda o, i: i),
        (torch.nn.Embedding(5, 4), lambda token, d: token, lambda token, d: d),
        (transformers.pytorch_utils.Conv1D(4, 5), lambda i, o: o, lambda i, o: i),
        (torch.nn.Conv2d(4, 6, (2, 3)), lambda o, i, *at: o, lambda o, i, *at: i),
        (torch.nn.Conv1d(6, 4, 3, groups=2), lambda o, i, t: o, lambda o, i, t: (o // 2, i)),
        (torch.nn.ConvTranspose1d(6, 4, 3), lambda i, o, t: o, lambda i, o, t: i),
        (torch.nn.ConvTranspose2d(6, 4, 3, groups=2), lambda i, o, *at: (i // 3, o), lambda i, o, *at: i),
        (Experts(False), lambda e, o, i: (e, o), lambda e, o, i: (e, i)),
        (Experts(True), lambda e, i, o: (e, o), lambda e, i, o: (e, i)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_what_a_row_and_a_column_of_a_layer_are(module, neuron, source):
    views = layouts(module)
    scores = torch.rand(module.weight.shape)
    for scope, group_of in (("row", neuron), ("column", source)):
        mask = sparseft.top_k({"weight": scores}, per_group=1, scope=scope, layouts=views)
        best = {}
        for position in np.ndindex(*scores.shape):
            group = group_of(*position)
            if group not in best or scores[position] > scores[best[group]]:
                best[group] = position
        assert mask["weight"].tolist() == sorted(np.ravel_multi_index(p, scores.shape) for p in best.values())


def test_select_finds_the_rows_of_each_layer():
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=6, vocab_size=11)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))  # no score of zero, as new biases have
    mask = sparseft.select("magnitude", model, per_group=1, scope="row")
    weights = model.transformer.h[0].mlp.c_fc.weight  # [I, O]
    chosen = mask["transformer.h.0.mlp.c_fc.weight"].long()
    assert set(chosen.tolist()) == {int(i) * 32 + o for o, i in enumerate(weights.abs().argmax(0))}
    assert mask["transformer.wte.weight"].numel() == 11
    assert mask["transformer.ln_f.bias"].numel() == 1
    assert mask.info["scope"] == "row"
    assert mask.info["per_group"] == 1


def test_a_mask_says_how_it_was_ranked_as_its_file_does(tmp_path):
    model = torch.nn.Linear(8, 8)
    mask = sparseft.select("magnitude", model, density=0.5, scope="block", block=(2, 4))
    mask.save(tmp_path / "mask")
    assert sparseft.Mask.load(tmp_path / "mask").info == mask.info
    assert mask.info["block"] == [2, 4]


def test_layers_are_told_by_the_first_number_in_a_name():
    names = ["a.layer.0.x", "b", "a.layer.0.y.3.z", "a.layer.10.x", "c.layer.0.x", "3.weight", "norm1.weight"]
    scores = {name: torch.rand(10) for name in names}
    mask = sparseft.top_k(scores, per_group=1, scope="layer")
    assert mask.k == 5
    apart = [("a.layer.0.x", "a.layer.0.y.3.z"), ("a.layer.10.x",), ("c.layer.0.x",), ("3.weight",)]
    for together in (*apart, ("b", "norm1.weight")):
        assert sum(mask[name].numel() for name in together if name in mask) == 1


def whole_units(scores, k, scope, structure, block):
    """Take units by mean score until the next one does not fit."""
    units = {}
    for unit, of_unit in groups_of(scores, structure, block).items():
        of_unit = sorted(of_unit, key=lambda entry: (list(scores).index(entry[1]), entry[2]))
        units[unit] = (float(np.float32(np.mean([score for score, _, _ in of_unit]))), of_unit)
    sets = defaultdict(list)
    for unit, (_, of_unit) in units.items():
        name = of_unit[0][1]
        sets[label(name, (), scope, None)].append(unit)
    budgets = divide(k, {group: sum(len(units[unit][1]) for unit in mine) for group, mine in sets.items()})
    taken = set()
    for group, mine in sets.items():
        left = budgets[group]
        for unit in sorted(mine, key=lambda unit: -units[unit][0]):
            if len(units[unit][1]) > left:
                break
            left -= len(units[unit][1])
            taken |= {(name, number) for _, name, number in units[unit][1]}
    return taken


@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
@pytest.mark.parametrize(("structure", "block"), [("row", None), ("column", None), ("block", (2, 3))])
def test_whole_units_by_their_mean_score(scope, structure, block):
    total = sum(score.numel() for score in random_scores(0).values())
    for distinct in (None, 3):
        for density in (0.2, 0.5, 0.9, 1.0):
            scores = random_scores(3, distinct=distinct)
            mask = sparseft.top_k(scores, density, scope=scope, structure=structure, block=block)
            budget = int(density * total + 1e-9)
            assert entries(mask) == whole_units(scores, budget, scope, structure, block)
            assert mask.k <= budget
            assert mask.info["unused"] == budget - mask.k
            if scope == "global":
                again = sparseft.top_k(scores, k=mask.k, structure=structure, block=block)
                assert again == mask
                assert "unused" not in again.info


def test_a_mask_keeps_how_much_of_its_budget_is_unused(tmp_path):
    model = torch.nn.Linear(10, 4, bias=False)
    mask = sparseft.select("magnitude", model, density=0.6, structure="row")
    assert mask.k == 20
    assert mask.info["unused"] == 4
    mask.save(tmp_path / "mask")
    assert sparseft.Mask.load(tmp_path / "mask").info["unused"] == 4
    assert "unused" not in sparseft.select("magnitude", model, density=0.6).info


def test_a_number_of_entries_that_is_not_one_of_whole_units_is_refused():
    scores = {"w": torch.rand(4, 10), "b": torch.rand(4)}
    with pytest.raises(ValueError, match=r"k=25 entries must be whole rows.*w and others 2. of 25"):
        sparseft.top_k(scores, k=25, structure="row")
    with pytest.raises(ValueError, match=r"must hold a whole row, but these take in w 0 of 2 entries.* 10"):
        sparseft.top_k(scores, 2 / 44, structure="row", scope="tensor")
    assert sparseft.top_k({"w": scores["w"]}, k=30, structure="row").k == 30


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scope": "neuron"}, ValueError, "scope must be one of global, layer, tensor, row, column, block"),
        ({"structure": "tensor"}, ValueError, "structure must be one of row, column, block"),
        ({"structure": "row", "scope": "row"}, ValueError, "compete in scope 'global'"),
        ({"block": 4}, ValueError, "block goes with"),
        ({"scope": "block"}, TypeError, r"block must be \(rows, columns\)"),
        ({"scope": "block", "block": (2, 2.5)}, TypeError, "block must be"),
        ({"scope": "block", "block": (0, 2)}, ValueError, "at least one row"),
        ({"per_group": 2, "scope": "row"}, ValueError, "one of density, k and per_group"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        sparseft.top_k({"w": torch.rand(4, 4)}, 0.5, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"per_group": 2}, ValueError, "per_group counts single entries in groups"),
        ({"per_group": 2, "structure": "row"}, ValueError, "per_group counts single entries in groups"),
        ({"per_group": 0, "scope": "row"}, ValueError, "at least 1"),
        ({"per_group": 0.5, "scope": "row"}, TypeError, "whole number"),
        ({"scope": "row"}, ValueError, "give"),
    ],
)
def test_a_number_in_every_group_is_checked(options, error, message):
    with pytest.raises(error, match=message):
        sparseft.top_k({"w": torch.rand(4, 4)}, **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{}, {"scope": "row"}, {"structure": "column"}])
def test_scores_that_are_not_finite_are_refused_by_name(bad, options):
    scores = {"good": torch.rand(4, 4), "w": torch.rand(4, 4)}
    scores["w"][1, 2] = bad
    with pytest.raises(ValueError, match="finite, got NaN or infinite values in w;"):
        sparseft.top_k(scores, 0.5, **options)
