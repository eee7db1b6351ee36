"""A space on a model: exactly the planned weights train, by each strategy's own definition."""

import copy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import models
import pytest
import torch
import transformers as tf
from models import one_thread  # noqa: F401

import sparseft
from sparseft.design_space import Space, plan
from sparseft.integrations.design_space import apply_space, attach
from sparseft.selection import METHODS

pytest.importorskip("peft", reason="LoRA and prefixes need peft: pip install 'sparseft[peft]'")

SPACES = {
    "bert": Space(("ABS", "LPS"), "uniform"),
    "gpt2": Space(("ALS", "BPS"), "uniform"),
    "llama": Space(("ALS", "PS"), "uniform"),
    "t5": Space(("APS", "LS"), "uniform"),
}
HEADS = {"bert": "classifier.*"}
BUDGET = 4_001


def applied(name, **options):
    model = models.make(name).eval()
    return model, apply_space(
        SPACES[name], model, BUDGET, method="random", dense=HEADS.get(name, ()), progress=False, **options
    )


@pytest.mark.parametrize("name", SPACES)
def test_exactly_the_budget_trains_and_nothing_else(name):
    model, found = applied(name)
    head = sum(p.numel() for n, p in model.named_parameters() if n.startswith("classifier"))
    assert found.mask.trained == BUDGET + head
    assert found.mask.k == sum(part.weights for part in found.plan.parts("S"))
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = sparseft.SparseAdamW(found.mask.param_groups(model), lr=1e-2)
    for seed in range(3):
        model(**models.batch(name, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = 0
    parameters = dict(model.named_parameters())
    for key, parameter in parameters.items():
        where = (parameter != before[key]).reshape(-1).nonzero()[:, 0].tolist()
        allowed = found.mask[key].tolist() if key in found.mask else range(parameter.numel())
        assert key in found.mask or key in found.mask.dense or not where, key
        assert set(where) <= set(allowed), key
        changed += len(where)
    # some relus are dead, and the key bias of softmax attention has no gradient
    assert 0.7 * found.mask.trained < changed <= found.mask.trained


@pytest.mark.parametrize("name", SPACES)
def test_compact_gradients_are_those_of_dense_ones(name):
    model, found = applied(name)
    with torch.no_grad():
        for parameter in (model.get_parameter(key) for key in found.mask.dense):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    dense, batch = copy.deepcopy(model), models.batch(name)
    dense(**batch).loss.backward()
    want = {key: parameter.grad for key, parameter in dense.named_parameters()}
    with sparseft.compact_gradients(model, found.mask) as compact:
        model(**batch).loss.backward()
        for key, leaf in compact.entries.items():
            torch.testing.assert_close(leaf.grad, want[key].reshape(-1)[found.mask[key].long()], rtol=1e-4, atol=1e-6)
        for key in found.mask.dense:
            torch.testing.assert_close(model.get_parameter(key).grad, want[key], rtol=1e-4, atol=1e-6)
            assert model.get_parameter(key).grad.abs().sum() > 0 or "key.bias" in key, key


def test_a_space_without_selected_entries_trains_and_is_saved_like_any_other(tmp_path):
    model = models.make("bert").eval()
    found = apply_space(Space(("AB", "L"), "uniform"), model, 3_000, dense=HEADS["bert"], remainder="leave")
    assert not found.mask.k
    plain, names = copy.deepcopy(model), list(model.state_dict())
    model.get_parameter("bert.pooler.dense.bias").requires_grad_(True)
    for step in range(3):
        batch = models.batch("bert", seed=step)
        for each, context in ((model, sparseft.compact_gradients(model, found.mask)), (plain, nullcontext())):
            with context:
                optimizer = sparseft.SparseAdamW(found.mask.param_groups(each), lr=1e-2)
                each(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                assert list(copy.deepcopy(each).state_dict()) == list(each.state_dict()) == names
                if each is model:
                    assert {n for n, p in each.named_parameters() if p.requires_grad} == set(found.mask.dense)
    assert model.get_parameter("bert.pooler.dense.bias").requires_grad, "leaving puts back what was frozen"
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    with sparseft.compact_gradients(model, found.mask):
        sparseft.save_delta(model, found.mask, tmp_path / "delta.safetensors")
    again = models.make("bert").eval()
    attach(found.plan, again)
    assert not torch.equal(again(**batch).logits, plain(**batch).logits)
    sparseft.load_delta(again, tmp_path / "delta.safetensors")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in again.state_dict().items())


@torch.no_grad()  # kernels of attention depend on what has requires_grad
@pytest.mark.parametrize("name", SPACES)
def test_a_delta_rebuilds_the_model(name, tmp_path):
    model, found = applied(name)
    for key in found.mask.dense:
        model.get_parameter(key).add_(0.1)
    for key in found.mask:
        model.get_parameter(key).view(-1)[found.mask[key].long()] += 0.1
    sparseft.save_delta(model, found.mask, tmp_path / "delta.safetensors")
    again = models.make(name).eval()
    attach(found.plan, again)
    sparseft.load_delta(again, tmp_path / "delta.safetensors")
    batch = models.batch(name)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    copied = copy.deepcopy(again)
    assert torch.equal(copied(**batch).logits, model(**batch).logits)
    assert all(parameter.requires_grad for parameter in again.parameters()), "attaching freezes nothing"
    for key in found.mask.dense:
        again.get_parameter(key).zero_()
    assert not torch.equal(again(**batch).logits, model(**batch).logits)
    assert torch.equal(copied(**batch).logits, model(**batch).logits), "a copy uses its own adapters and prefixes"


NEW_PROCESS = """
import models, sparseft, sys, torch
from sparseft.design_space import Space, plan
from sparseft.integrations.design_space import attach

delta = sparseft.Delta.load(sys.argv[1])
model, made = models.make("bert").eval(), delta.mask.info
attach(plan(Space.from_plain(made["space"]), model, made["budget"], **made["plan"]), model)
delta.apply(model)
torch.save(model(**models.batch("bert")).logits.detach(), sys.argv[2])
"""


@pytest.mark.parametrize("options", [{}, {"lora_scale": 3.0, "lora_targets": ["key"], "stacks": "bert.encoder.layer"}])
def test_a_delta_says_how_its_plan_is_made_again_in_a_new_process(tmp_path, options):
    model, found = applied("bert", **options)
    with torch.no_grad():
        for key in found.mask.dense:
            model.get_parameter(key).add_(0.1)
    sparseft.save_delta(model, found.mask, tmp_path / "delta.safetensors")
    wanted = model(**models.batch("bert")).logits
    files = [str(tmp_path / name) for name in ("delta.safetensors", "logits.pt")]
    subprocess.run([sys.executable, "-c", NEW_PROCESS, *files], check=True, cwd=Path(__file__).parent)
    # another process may have another number of threads, and so another order of sums
    torch.testing.assert_close(torch.load(files[1]), wanted, rtol=1e-5, atol=1e-5)
    again = models.make("bert").eval()
    attach(found.plan, again)
    sparseft.load_delta(again, files[0])
    assert torch.equal(again(**models.batch("bert")).logits, wanted), "the plan alone has the scale too"


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_lora_and_adapters_begin_as_the_pretrained_model(name):
    model = models.make(name).eval()
    wanted = copy.deepcopy(model)(**models.batch(name)).logits
    apply_space(Space(("A", "AL"), "uniform"), model, 4_000, remainder="leave")
    torch.testing.assert_close(model(**models.batch(name)).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPACES)
def test_what_is_attached_has_the_dtype_of_its_layer(name):
    model = models.make(name, dtype=torch.bfloat16).eval()
    found = apply_space(SPACES[name], model, BUDGET, method="random", progress=False)
    assert {parameter.dtype for key, parameter in model.named_parameters() if "lora" not in key} == {torch.bfloat16}
    model(**models.batch(name)).loss.backward()
    assert all(model.get_parameter(key).grad.isfinite().all() for key in found.mask.dense)


def test_what_is_attached_depends_on_the_seed_alone():
    first, second, third = (models.make("bert") for _ in range(3))
    for model, seed in ((first, 0), (second, 0), (third, 1)):
        torch.rand(seed + 1)
        state = torch.get_rng_state()
        found = apply_space(SPACES["bert"], model, BUDGET, method="magnitude", seed=seed, progress=False)
        assert torch.equal(state, torch.get_rng_state())
    values = [{key: model.get_parameter(key) for key in found.mask.dense} for model in (first, second, third)]
    assert all(torch.equal(values[0][key], values[1][key]) for key in found.mask.dense)
    assert not all(torch.equal(values[0][key], values[2][key]) for key in found.mask.dense)


def test_lora_has_the_ranks_of_the_plan_and_one_scale():
    model = models.make("bert")
    found = apply_space(Space(("L", "L"), "uniform", "increasing"), model, 3_000, remainder="leave", lora_scale=2.0)
    ranks = [part.size for part in found.plan.parts("L")]
    assert ranks == [7, 15]
    for layer, rank in enumerate(ranks):
        attention = model.bert.encoder.layer[layer].attention.self
        for module in (attention.query, attention.value):
            assert module.lora_A["default"].weight.shape == (rank, 32)
            assert module.scaling["default"] == 2.0
        assert type(attention.key) is torch.nn.Linear


def test_lora_stays_in_its_group_in_a_mixture_of_experts():
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_local_experts=2,
    )
    model = tf.MixtralForCausalLM(config)
    found = apply_space(Space(("P", "LS"), "uniform"), model, 2_048, method="magnitude", progress=False)
    assert found.mask.trained == 2_048
    adapted = [name for name, _ in model.named_parameters() if "lora" in name]
    assert adapted
    assert all(name.startswith("model.layers.1.self_attn.") for name in adapted)


def test_an_adapter_is_its_definition():
    model = models.make("bert").eval()
    seen = {}
    layer = model.bert.encoder.layer[1]
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.update(plain=output))
    apply_space(Space(("S", "A"), "uniform", tunable=(2,)), model, 500, remainder="leave")
    adapter = layer.bottleneck_adapter
    assert adapter.down.weight.shape == (7, 32)
    torch.nn.init.normal_(adapter.up.weight)
    torch.nn.init.normal_(adapter.up.bias)
    layer.register_forward_hook(lambda module, inputs, output: seen.update(adapted=output))
    model(**models.batch("bert"))
    handle.remove()
    x = seen["plain"][0] if isinstance(seen["plain"], tuple) else seen["plain"]
    inner = (x @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    wanted = x + inner @ adapter.up.weight.T + adapter.up.bias
    got = seen["adapted"][0] if isinstance(seen["adapted"], tuple) else seen["adapted"]
    torch.testing.assert_close(got, wanted)


def test_entries_are_those_that_select_chooses_in_the_group():
    model, plain = models.make("bert"), models.make("bert")
    data = [models.batch("bert", seed=seed) for seed in range(2)]
    options = {"progress": False}
    found = apply_space(Space(("LS", "BS"), "uniform"), model, 2_000, data, method="fish", **options)
    for part in found.plan.parts("S"):
        wanted = sparseft.select("fish", plain, data, k=part.weights, include=list(part.names), **options)
        renamed = {name.replace(".base_layer", ""): name for name in found.mask}
        for name in wanted:
            assert torch.equal(wanted[name], found.mask[renamed[name]])
    assert any(".base_layer.weight" in name for name in found.mask)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"bitfit", "ird"}))
def test_data_is_read_once_and_every_group_has_what_it_would_choose_alone(method):
    data = [models.batch("bert", seed=seed) for seed in range(2)]
    found = apply_space(
        Space(("BS", "AS"), "uniform"), models.make("bert"), 2_001, iter(data), method=method, progress=False
    )
    assert found.mask.trained == 2_001
    parts, plain = found.plan.parts("S"), models.make("bert")
    for part in parts[:1] if method == "random" else parts:
        wanted = sparseft.select(method, plain, data, k=part.weights, include=list(part.names), progress=False)
        assert wanted.k == part.weights
        for name in part.names:
            assert (name in wanted) == (name in found.mask), name
            assert name not in wanted or torch.equal(wanted[name], found.mask[name]), name


def test_a_model_is_scored_once(monkeypatch):
    scored = []

    def score(model, data, names, **options):
        scored.append(names)
        return METHODS["magnitude"].score(model, data, names, **options)

    monkeypatch.setitem(METHODS, "fish", METHODS["fish"]._replace(score=score))
    found = apply_space(Space(("S", "S"), "uniform"), models.make("bert"), 100, [{}], method="fish")
    assert scored == [[name for part in found.plan.parts("S") for name in part.names]]
    apply_space(Space(("A", "A"), "uniform"), models.make("bert"), 1_000, method="fish", remainder="leave")
    assert len(scored) == 1, "without selected entries there is nothing to score"


REFUSALS = [
    ({"dense": "*query*"}, r"outside the layers too, got \['bert.encoder"),
    ({"dense": "nothing*"}, "matches no parameter"),
    ({"method": "fish"}, "needs data"),
    ({"method": "fish", "data": iter([])}, "at least one sample"),
    ({"method": "bitfit"}, "must score entries, .* got 'bitfit'"),
    ({"method": "ird", "data": [models.batch("bert")]}, "must score entries, .* got 'ird'"),
    ({"method": "magnitude", "samples": 3}, "has no option samples"),
    ({"lora_targets": ["nowhere"]}, "named .'nowhere'"),
    ({"lora_scale": 0.0}, "lora_scale must be positive, got 0.0"),
    ({"lora_scale": "2"}, "lora_scale must be a number, got '2'"),
    ({"lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\), got 1.0"),
    ({"budget": 100}, "too few"),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS)
def test_refusals_change_nothing(options, message):
    model = models.make("bert")
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    with pytest.raises((ValueError, TypeError), match=message):
        apply_space(SPACES["bert"], model, **{"budget": BUDGET, "method": "magnitude", "progress": False, **options})
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], v) and after[n].requires_grad == g for n, (v, g) in before.items())
    assert model.config._attn_implementation == "sdpa"


def test_a_model_is_adapted_once():
    model, found = applied("bert")
    with pytest.raises(ValueError, match="has been adapted before"):
        apply_space(SPACES["bert"], model, BUDGET, method="random")
    with pytest.raises(ValueError, match="has been adapted before"):
        attach(found.plan, model)


def test_the_table_counts_what_is_outside():
    _, found = applied("bert")
    assert str(found) == f"{found.plan}\n{BUDGET + 99:,} weights train, 99 of them outside the budget"


def test_a_space_without_peft_needs_no_peft(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    apply_space(Space(("AS", "BS"), "uniform"), models.make("bert"), 4_000, method="magnitude", progress=False)
    with pytest.raises(RuntimeError, match=r"pip install 'sparseft\[peft\]'"):
        apply_space(Space(("LS", "BS"), "uniform"), models.make("bert"), 4_000, method="magnitude", progress=False)


def test_plans_do_not_depend_on_the_data():
    model = models.make("bert")
    found = plan(SPACES["bert"], model, BUDGET, lora_targets=["query", "value"])
    assert found == applied("bert")[1].plan


@pytest.mark.parametrize("other", ["s4", "space.json", None])
def test_a_space_is_a_space(other):
    with pytest.raises(TypeError, match=r"space must be a Space, got (str|NoneType); Space.load reads"):
        apply_space(other, models.make("bert"), BUDGET, method="magnitude")


def test_a_plan_is_attached_to_a_model_that_has_its_layers():
    _, found = applied("bert")
    other = torch.nn.ModuleDict({"bert": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"the plan is of another model: bert.encoder.* are not in this ModuleDict"):
        attach(found.plan, other)
    assert [name for name, _ in other.named_modules()] == ["", "bert"]
    with pytest.raises(TypeError, match="attach takes a Plan, got Space"):
        attach(SPACES["bert"], models.make("bert"))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        attach(found.plan, "bert")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        apply_space(SPACES["bert"], "bert", BUDGET)
