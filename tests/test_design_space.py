"""Design spaces as data: sizes of groups, shares of a budget, layers of models, files."""

import json
import os
import random
from fractions import Fraction

import models
import pytest
import transformers as tf
from torch import nn

from sparseft.design_space import ALLOCATIONS, GROUPINGS, PRESETS, Space, allocate, find_layers, group_sizes

PUBLISHED_ORDERS = {
    "increasing": lambda n: n[0] < n[1] < n[2] < n[3],
    "uniform": lambda n: max(n) - min(n) <= 1,
    "decreasing": lambda n: n[0] > n[1] > n[2] > n[3],
    "spindle": lambda n: n[0] < n[1] and n[2] > n[3] and abs(n[1] - n[2]) <= 1 and abs(n[0] - n[3]) <= 1,
    "bottleneck": lambda n: n[0] > n[1] and n[2] < n[3] and abs(n[1] - n[2]) <= 1 and abs(n[0] - n[3]) <= 1,
}


@pytest.mark.parametrize(
    ("pattern", "layers", "sizes"),
    [
        ("spindle", 12, [2, 4, 4, 2]),
        ("spindle", 24, [4, 8, 8, 4]),
        ("spindle", 32, [5, 11, 11, 5]),
        ("spindle", 6, [1, 2, 2, 1]),
        ("bottleneck", 12, [4, 2, 2, 4]),
        ("uniform", 12, [3, 3, 3, 3]),
        ("uniform", 6, [2, 2, 1, 1]),
        ("increasing", 10, [1, 2, 3, 4]),
        ("increasing", 12, [1, 2, 4, 5]),
        ("decreasing", 12, [5, 4, 2, 1]),
        ("increasing", 4, [1, 1, 1, 1]),
        ([1, 1, 1, 9], 12, [1, 1, 1, 9]),
    ],
)
def test_sizes_of_groups(pattern, layers, sizes):
    assert group_sizes(pattern, layers, 4) == sizes


@pytest.mark.parametrize("pattern", GROUPINGS)
def test_every_number_of_layers_is_split_whole_and_in_the_published_order(pattern):
    for layers in range(4, 130):
        sizes = group_sizes(pattern, layers, 4)
        assert sum(sizes) == layers
        assert min(sizes) >= 1
        assert layers < 12 or PUBLISHED_ORDERS[pattern](sizes), (layers, sizes)


@pytest.mark.parametrize(("pattern", "groups"), [("bottleneck", 5), ("spindle", 5), ("increasing", 1), ("spindle", 2)])
def test_other_numbers_of_groups(pattern, groups):
    wanted = {5: {"bottleneck": [3, 2, 1, 2, 3], "spindle": [1, 2, 3, 2, 1]}, 1: {"increasing": [11]}}
    wanted = wanted.get(groups, {"spindle": [6, 5]})[pattern]
    assert group_sizes(pattern, sum(wanted), groups) == wanted


@pytest.mark.parametrize(
    ("pattern", "layers", "message"),
    [
        ("round", 12, "must be one of increasing"),
        ("uniform", 3, "3 layers cannot be 4 groups"),
        ([3, 3, 3, 4], 12, "with the sum 12"),
        ([0, 6, 3, 3], 12, "positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(pattern, layers, message):
    with pytest.raises(ValueError, match=message):
        group_sizes(pattern, layers, 4)


@pytest.mark.parametrize("pattern", ALLOCATIONS)
def test_allocation_is_exact_and_nearest_to_its_shares(pattern):
    layer_share = {"increasing": (1, 2, 3, 4), "uniform": (1, 1, 1, 1), "decreasing": (4, 3, 2, 1)}[pattern]
    draw = random.Random(0)
    for _ in range(200):
        layers = [draw.randint(1, 9) for _ in range(4)]
        tunable = sorted(draw.sample(range(1, 5), draw.randint(1, 4)))
        budget = draw.randint(1, 10**9)
        shares = allocate(pattern, budget, layers, tunable)
        assert sum(shares) == budget
        whole = sum(layer_share[i - 1] * layers[i - 1] for i in tunable)
        for i in range(1, 5):
            exact = Fraction(budget * layer_share[i - 1] * layers[i - 1], whole) if i in tunable else Fraction(0)
            assert abs(shares[i - 1] - exact) < 1


def test_shares_can_be_given():
    assert allocate((1, 0.5, 1, 2), 9, [2, 2, 1, 1], [1, 2, 4]) == [4, 2, 0, 3]
    with pytest.raises(ValueError, match="one share for each of 4"):
        allocate((1, 2), 9, [2, 2, 1, 1], [1])


STACKS = {
    "bert": ["bert.encoder.layer"],
    "roberta": ["roberta.encoder.layer"],
    "gpt2": ["transformer.h"],
    "llama": ["model.layers"],
    "t5": ["encoder.block", "decoder.block"],
}


@pytest.mark.parametrize("name", STACKS)
def test_layers_are_found(name):
    model = models.make(name)
    stacks = find_layers(model)
    assert [[layer.name for layer in stack] for stack in stacks] == [
        [f"{s}.{i}" for i in (0, 1)] for s in STACKS[name]
    ]
    owned = [p for p, _ in model.named_parameters() if any(layer.owns(p) for stack in stacks for layer in stack)]
    outside = {p for p, _ in model.named_parameters()} - set(owned)
    assert not any(part.isdigit() for p in outside for part in p.split("."))
    assert all(any(part.isdigit() for part in p.split(".")) for p in owned)


def test_a_layer_of_two_digits_is_not_that_of_one():
    config = tf.BertConfig(
        hidden_size=8, num_hidden_layers=12, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    (stack,) = find_layers(tf.BertModel(config))
    assert not stack[1].owns("encoder.layer.10.output.dense.weight")
    groups = Space(("S",) * 4).group_layers([stack])
    assert [[layer.number for layer in group] for group in groups] == [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]


def test_encoder_and_decoder_have_one_pattern():
    config = tf.T5Config(d_model=8, d_kv=8, d_ff=8, num_layers=6, num_decoder_layers=12, num_heads=1, vocab_size=9)
    groups = Space.preset("s4").group_layers(find_layers(tf.T5Model(config)))
    assert [layer.name for layer in groups[0]] == ["encoder.block.0", "decoder.block.0", "decoder.block.1"]
    assert [len(group) for group in groups] == [3, 6, 6, 3]


def test_models_without_layers_are_refused():
    with pytest.raises(ValueError, match=r"must be names of lists of modules, got \['encoder'\]"):
        find_layers(nn.Sequential(nn.Linear(2, 2)), "encoder")
    with pytest.raises(ValueError, match=r"Sequential has no layers.*stacks="):
        find_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "b": nn.ModuleList([nn.Linear(2, 2)] * 2)})
    assert [layer.name for layer in find_layers(model)[0]] == ["b.0", "b.1"]
    assert [layer.name for layer in find_layers(model, ["a"])[0]] == ["a.0", "a.1"]
    with pytest.raises(ValueError, match=r"got \['c'\]; there are \['a', 'b'\]"):
        find_layers(model, ["c"])


SPACES = [
    *PRESETS.values(),
    Space(("S", "SB", "LS"), grouping=(2, 4, 1), allocation=(1, 0.25, 3), tunable=(1, 3)),
]


@pytest.mark.parametrize("space", SPACES)
def test_files_give_back_what_was_saved(space, tmp_path):
    space.save(tmp_path / "space.json")
    assert Space.load(tmp_path / "space.json") == space
    assert os.listdir(tmp_path) == ["space.json"]


def test_the_published_pattern():
    space = Space.preset("s4")
    assert space == Space(("LA", "PA", "APB", "PBL"), "spindle", "uniform", (1, 2, 3, 4))
    with pytest.raises(ValueError, match="must be one of s4, s4-3b, got 's5'"):
        Space.preset("s5")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"strategies": ()}, "for each group, got none"),
        ({"strategies": ("S", "")}, "each once, got ''"),
        ({"strategies": ("S", "SS")}, "each once, got 'SS'"),
        ({"strategies": ("S", "X")}, "got 'X'"),
        ({"strategies": "SL"}, "strategies must be a tuple"),
        ({"strategies": ("S", "L"), "grouping": "round"}, "grouping must be one of"),
        ({"strategies": ("S", "L"), "grouping": (1, 0)}, "2 positive numbers"),
        ({"strategies": ("S", "L"), "grouping": (1.5, 2)}, "grouping must be a tuple"),
        ({"strategies": ("S", "L"), "allocation": "spindle"}, "allocation must be one of"),
        ({"strategies": ("S", "L"), "allocation": (1, float("nan"))}, "2 positive shares"),
        ({"strategies": ("S", "L"), "tunable": (2, 1)}, "increasing numbers of groups from 1 to 2"),
        ({"strategies": ("S", "L"), "tunable": (0,)}, "from 1 to 2"),
        ({"strategies": ("S", "L"), "tunable": (True,)}, "tunable must be a tuple"),
    ],
)
def test_spaces_that_mean_nothing_are_refused(fields, error):
    with pytest.raises((ValueError, TypeError), match=error):
        Space(**fields)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda text: text[:40], "is not a readable design space"),
        (lambda text: text.replace("space 1", "space 2"), '"format"'),
        (lambda text: text.replace("tunable", "tuneable"), "no others"),
        (lambda text: text.replace('"spindle"', "4"), "grouping must be a tuple"),
        (lambda text: text.replace('"AL"', '"AZ"'), "got 'AZ'"),
        (lambda text: text.replace('"uniform"', '"uniform", "allocation": "increasing"'), "twice"),
        (lambda text: json.dumps([text]), "must be an object"),
    ],
)
def test_files_are_read_strictly(change, error, tmp_path):
    path = tmp_path / "space.json"
    Space.preset("s4").save(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=error):
        Space.load(path)


def test_a_failed_save_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "space.json"
    Space.preset("s4").save(path)
    monkeypatch.setattr(os, "fsync", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Space(("S",)).save(path)
    assert Space.load(path) == Space.preset("s4")
    assert os.listdir(tmp_path) == ["space.json"]
