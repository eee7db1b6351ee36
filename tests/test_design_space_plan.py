"""Spending a budget: exact in total, each strategy as large as its share allows, and errors that say by how much."""

import random
import re

import models
import pytest
import transformers as tf
from torch import nn

import sparseft
from sparseft.design_space import Space, find_layers, plan

TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}
ORDER = "BLPAS"


def unit(model, name, letter, layers):
    """Weights of size 0, and of one more, counted by hand for hidden size 32 and key-value width 32 (llama: 16)."""
    n = len(layers)
    if letter == "A":
        return 32 * n, 65 * n
    if letter == "P":
        return 0, n * 2 * (16 if name == "llama" else 32)
    modules = [
        module
        for path, module in model.named_modules()
        if any(path.startswith(layer.name + ".") for layer in layers) and path.split(".")[-1] in TARGETS[name]
    ]
    return 0, sum(sum(module.weight.shape) for module in modules)


@pytest.mark.parametrize("name", TARGETS)
def test_budgets_are_met_exactly_and_sizes_are_the_largest(name):
    model = models.make(name)
    draw = random.Random(0)
    letters = "ALPS" if name == "llama" or name == "t5" else "ABLPS"
    for _ in range(40):
        sets = tuple("".join(draw.sample(letters, draw.randint(1, len(letters)))) for _ in range(2))
        space = Space(sets, "uniform", allocation=draw.choice(["uniform", "increasing"]))
        budget = draw.randint(5_000, 8_000)
        found = plan(space, model, budget, lora_targets=TARGETS[name], remainder="sparse")
        assert found.weights == budget == sum(group.weights for group in found.groups)
        for group, strategies in zip(found.groups, space.strategies, strict=True):
            assert group.weights == group.budget
            left = group.budget
            waiting = [letter for letter in ORDER if letter in strategies]
            for part in group.parts:
                assert part.strategy in waiting or (part.strategy == "S" and not waiting)
                if part.strategy in "APL":
                    fixed, more = unit(model, name, part.strategy, group.layers)
                    share = left // len(waiting)
                    assert part.weights == fixed + more * part.size <= share
                    most = (16 if name == "llama" else 32) if part.strategy == "L" else None
                    assert fixed + more * (part.size + 1) > share or part.size == most
                left -= part.weights
                waiting = [letter for letter in waiting if letter != part.strategy]
            assert left == 0
            assert not waiting


def test_biases_are_those_of_the_group():
    model = models.make("bert")
    found = plan(Space(("BS", "B"), "uniform", tunable=(1,)), model, 3_000)
    bias, sparse = found.groups[0].parts
    wanted = {name for name, _ in model.named_parameters() if ".layer.0." in name and name.endswith("bias")}
    assert set(bias.names) == wanted
    assert bias.weights == 7 * 32 + 48
    assert sparse.weights == 3_000 - bias.weights
    assert not set(sparse.names) & wanted
    assert not found.groups[1].parts
    assert found.groups[1].budget == 0


def test_biases_are_those_of_bitfit():
    """Those of other names too: DeBERTa's first version has two for a projection that is packed."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = tf.DebertaModel(tf.DebertaConfig(**sizes, vocab_size=61))
    found = plan(Space(("BS", "B"), tunable=(1,)), model, 3_000).groups[0].parts[0]
    assert "encoder.layer.0.attention.self.q_bias" in found.names
    assert list(found.names) == list(sparseft.select("bitfit", model, include="encoder.layer.0.*"))


def test_frozen_parameters_are_left_out():
    model = models.make("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("output" in name)
    found = plan(Space(("S", "S"), "uniform"), model, 100)
    assert all("output" in name for part in found.parts("S") for name in part.names)


ERRORS = [
    ("llama", ("B", "S"), 4_000, {}, r"group 1: BitFit trains biases, and its layers of LlamaForCausalLM have none"),
    ("bert", ("BS", "S"), 500, {}, r"group 1: BitFit needs 272 weights, .* is 250: 22 too few"),
    ("bert", ("LS", "S"), 500, {}, r"group 1: LoRA needs 128 weights for rank 1, .* is 125: 3 too few"),
    ("bert", ("S", "P"), 100, {}, r"group 2: prefix needs 64 weights for length 1, .* is 50: 14 too few"),
    ("bert", ("S", "A"), 100, {}, r"group 2: adapter needs 97 weights for width 1, .* is 50: 47 too few"),
    ("bert", ("BS", "S"), 544, {}, r"group 1: sparse needs 1 weights for entries 1, .* is 0: 1 too few"),
    ("bert", ("S", "S"), 20_000, {}, r"group 1: 10,000 weights are to be selected from 7,\d+: 2,\d+ too many"),
    (
        "bert",
        ("L", "S"),
        600,
        {},
        r"cannot be met exactly.*: weights are left over in group 1 by 44 of its 300; add S",
    ),
    ("bert", ("L", "P"), 600, {}, r"in group 1 by 44 of its 300, group 2 by 44 of its 300"),
    ("bert", ("B", "S"), 700, {}, r"in group 1 by 78 of its 350"),
    ("bert", ("L", "S"), 600, {"lora_targets": ["nowhere"]}, r"named \['nowhere'\], and there are none"),
    ("bert", ("S",) * 3, 600, {}, r"2 layers cannot be 3 groups"),
    ("bert", ("S", "S"), 0, {}, r"budget must be at least one weight, got 0"),
    ("bert", ("S", "S"), 600, {"remainder": "drop"}, r"remainder must be one of"),
    ("albert", ("S", "S"), 600, {}, r"AlbertForSequenceClassification has no layers"),
]


@pytest.mark.parametrize(("name", "strategies", "budget", "options", "message"), ERRORS)
def test_what_cannot_be_says_which_group_and_by_how_much(name, strategies, budget, options, message):
    with pytest.raises(ValueError, match=message):
        plan(
            Space(strategies, "uniform"), models.make(name), budget, **{"lora_targets": ["query", "value"], **options}
        )


def test_budgets_are_whole_numbers():
    with pytest.raises(TypeError, match="whole number"):
        plan(Space(("S", "S"), "uniform"), models.make("bert"), 0.5)


def test_a_model_is_no_name():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str; load weights into a model first"):
        plan(Space(("S", "S"), "uniform"), "bert", 2_000)


def test_a_remainder_can_be_filled_or_left():
    model, space = models.make("bert"), Space(("L", "P"), "uniform")
    left = plan(space, model, 600, lora_targets=["query", "value"], remainder="leave")
    assert [group.weights for group in left.groups] == [256, 256]
    filled = plan(space, model, 600, lora_targets=["query", "value"], remainder="sparse")
    assert [[(part.strategy, part.weights) for part in group.parts] for group in filled.groups] == [
        [("L", 256), ("S", 44)],
        [("P", 256), ("S", 44)],
    ]


def test_layers_without_a_known_attention_or_width_are_refused():
    model = nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2, enable_nested_tensor=False))
    assert [layer.name for layer in find_layers(model)[0]] == ["0.layers.0", "0.layers.1"]
    for letter, message in {"P": "has no attention that can take", "A": "hidden_size features, and there is"}.items():
        with pytest.raises(ValueError, match=message):
            plan(Space(("S", letter), "uniform"), model, 600)


def test_the_table():
    space = Space(("LS", "ABS"), "uniform", tunable=(2,))
    text = str(plan(space, models.make("bert"), 1_000))
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert lines == [
        ["group", "layers", "budget", "strategy", "size", "weights"],
        ["1", "1", "0", "frozen", "0"],
        ["2", "1", "1,000", "BitFit", "biases 272", "272"],
        ["adapter", "width 5", "357"],
        ["sparse", "entries 371", "371"],
        ["all", "2", "1,000", "1,000"],
    ]
