"""Child-Tuning, GPS, SNIP, Wanda and BitFit on real architectures, against their definitions in plain autograd."""

import math
import re

import models
import pytest
import torch
from models import full_precision, one_thread  # noqa: F401
from transformers.pytorch_utils import Conv1D

import sparseft
from sparseft import testing

CLASSIFIERS = ["bert", "gpt2 classification"]
HEADS = {"bert": "classifier.*", "gpt2 classification": "score.*"}


def data(name, sizes=(6, 5)):
    """Batches of which each has several samples of some class; padding, and no two of one length."""
    made = [models.batch(name, samples, length=8 + seed, seed=seed) for seed, samples in enumerate(sizes)]
    if made[0]["labels"].dim() == 1:
        for batch in made:
            batch["labels"] = torch.arange(len(batch["labels"])) % models.CLASSES
    return made


def one_by_one(batches):
    """Yield batches of one sample, cut to its length."""
    for batch in batches:
        for n in range(len(batch["labels"])):
            sample = {key: value[n : n + 1] for key, value in batch.items()}
            length = int(sample["attention_mask"].sum())
            yield {key: value[:, :length] if value.dim() == 2 else value for key, value in sample.items()}


def gradients(model, value):
    """Return parameter name -> gradient of a scalar, zero where it does not depend on it."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    named = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in named}


def sample_gradients(model, batches):
    model.eval()
    return [gradients(model, model(**sample).loss) for sample in one_by_one(batches)]


def mean(dicts):
    return {name: sum(each[name] for each in dicts) / len(dicts) for name in dicts[0]}


def assert_best(mask, scores, k):
    """The k entries of the mask score no less than all others, up to rounding."""
    assert mask.k == k
    chosen = {name: torch.zeros(score.numel(), dtype=torch.bool) for name, score in scores.items()}
    for name, index in mask.items():
        chosen[name][index.long()] = True
    flat = torch.cat([score.detach().cpu().flatten().double() for score in scores.values()])
    inside = torch.cat(list(chosen.values()))
    assert flat[inside].min() >= flat[~inside].max() * (1 - 1e-4)
    # that is no accident: scores differ where the choice ends
    assert flat[inside].mean() > 2 * flat[~inside].mean()


def assert_best_of_rows(mask, scores, transposed=()):
    """Of each row exactly one entry is chosen, and it is the best one, up to rounding."""
    rounding = 1e-7 * max(float(score.detach().max()) for score in scores.values())
    assert set(mask) == set(scores)
    for name, score in scores.items():
        rows = score.detach().cpu().double()
        chosen = torch.zeros(score.numel(), dtype=torch.float64)
        chosen[mask[name].long()] = 1
        chosen = chosen.view(rows.shape)
        if name in transposed:
            rows, chosen = rows.T, chosen.T
        rows, chosen = (part.reshape(1, -1) if part.dim() == 1 else part for part in (rows, chosen))
        assert torch.equal(chosen.sum(1), torch.ones(len(rows), dtype=torch.float64)), name
        assert ((rows * chosen).sum(1) >= rows.max(1).values * (1 - 1e-4) - rounding).all(), name


def conv1d_weights(model):
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("name", [*CLASSIFIERS, "gpt2"])
def test_snip_takes_the_largest_products_of_weight_and_gradient(name, device):
    batches, model = data(name), models.make(name)
    grads = mean(sample_gradients(model, batches))
    scores = {key: (grads[key] * parameter).abs() for key, parameter in model.named_parameters()}
    on_device = models.make(name, device)
    assert_best(sparseft.select("snip", on_device, batches, k=300, batches=2), scores, 300)
    first = mean(sample_gradients(model, batches[:1]))
    scores = {key: (first[key] * parameter).abs() for key, parameter in model.named_parameters()}
    assert_best(sparseft.select("snip", on_device, batches, k=300), scores, 300)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_child_tuning_takes_the_largest_squares_of_sample_gradients(name):
    batches, model = data(name), models.make(name)
    grads = sample_gradients(models.make(name), batches)
    squares = mean([{key: grad.square() for key, grad in each.items()} for each in grads])
    mask = sparseft.select("child_tuning", model, batches, k=300)
    assert_best(mask, squares, 300)
    assert mask.info["samples"] == 11
    fewer = mean([{key: grad.square() for key, grad in each.items()} for each in grads[:8]])
    assert_best(sparseft.select("child_tuning", model, batches, k=300, samples=8), fewer, 300)


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_child_tuning_squares_clipped_gradients_of_batches_as_published(max_norm):
    batches, model, oracle = data("bert", (6, 6)), models.make("bert"), models.make("bert").eval()
    squares = []
    for batch in batches:
        oracle.zero_grad()
        oracle(**batch).loss.backward()
        for parameter in oracle.parameters():
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameter, max_norm)
        squares.append({name: parameter.grad.square() for name, parameter in oracle.named_parameters()})
    mask = sparseft.select("child_tuning", model, batches, k=300, fisher="batch", max_norm=max_norm, samples=None)
    assert_best(mask, mean(squares), 300)
    by_sample = sparseft.select("child_tuning", model, batches, k=300)
    assert mask != by_sample


def contrastive(features, labels, temperature):
    """Supervised contrastive loss, term by term: arXiv 2004.11362, equation 2."""
    units = features / features.norm(dim=1, keepdim=True)
    terms = []
    for i in range(len(units)):
        others = [j for j in range(len(units)) if j != i]
        same = [j for j in others if labels[j] == labels[i]]
        whole = sum(torch.exp(units[i] @ units[j] / temperature) for j in others)
        if same:
            terms.append(
                -sum(torch.log(torch.exp(units[i] @ units[j] / temperature) / whole) for j in same) / len(same)
            )
    return sum(terms)


def features_of(name, model, batch):
    found = []
    for sample in one_by_one([batch]):
        del sample["labels"]
        outputs = model.base_model(**sample)
        found.append(outputs.pooler_output if name == "bert" else outputs.last_hidden_state.mean(1))
    return torch.cat(found)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_gps_takes_the_largest_contrastive_gradient_of_each_neuron(name, temperature):
    batches, model = data(name), models.make(name)
    batches[1]["labels"] = torch.tensor([0, 0, 1, 2, 0])  # classes 1 and 2 have nothing to be near
    oracle = models.make(name).eval()
    losses = [contrastive(features_of(name, oracle, batch), batch["labels"], temperature) for batch in batches]
    head = HEADS[name]
    grads = gradients(oracle, sum(losses))
    scores = {key: grad.abs() for key, grad in grads.items() if not re.match(rf"{head}|.*(embeddings\.|wte|wpe)", key)}
    scores |= {key: grad.abs() for key, grad in grads.items() if "embeddings.LayerNorm" in key}
    options = {"temperature": temperature, "exclude": head}
    mask = sparseft.select("gps", model, batches, per_group=1, **options)
    assert_best_of_rows(mask, scores, conv1d_weights(model))
    assert all("embeddings.weight" in key or "wte" in key or "wpe" in key for key in mask.info["unscored"])
    assert_best(sparseft.select("gps", model, batches, k=300, scope="global", **options), scores, 300)


def test_gps_takes_features_and_losses_of_ones_own():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 4))
    inputs, labels = torch.randn(9, 20), torch.arange(9) % 4
    loss = contrastive(torch.tanh(model[0](inputs)), labels, 0.07)
    weight, bias = torch.autograd.grad(loss, [model[0].weight, model[0].bias])
    options = {"features": lambda net, x: net[:2](x), "exclude": "2.*", "per_group": 1}
    mask = sparseft.select("gps", model, [(inputs, labels)], **options)
    assert_best_of_rows(mask, {"0.weight": weight.abs(), "0.bias": bias.abs()})
    losses = torch.nn.functional.cross_entropy(model(inputs), labels)
    scores = {name: grad.abs() for name, grad in gradients(model, losses).items()}
    assert_best_of_rows(sparseft.select("gps", model, [(inputs, labels)], per_group=1, objective="task"), scores)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {}, "features do not depend on classifier.weight, classifier.bias"),
        ({"labels": torch.arange(3)}, {"exclude": "classifier.*"}, "no batch holds two"),
        ({"labels": torch.rand(3)}, {"exclude": "classifier.*"}, "one class a sample, got labels torch.float32"),
        ({"labels": None}, {"exclude": "classifier.*"}, "must hold labels"),
        ({}, {"objective": "loss"}, 'objective must be "contrastive" or "task"'),
        ({}, {"samples": 0}, "samples must be at least 1"),
        ({}, {"temperature": 0.0}, "temperature must be positive"),
        ({}, {"loss": len}, "loss of your own goes with"),
        ({}, {"objective": "task", "features": len}, "features are for"),
        ({}, {"features": lambda model, inputs: inputs["input_ids"][0]}, "one vector a sample"),
    ],
)
def test_gps_names_what_is_wrong(change, options, message):
    batch = {**models.batch("bert", 3), "labels": torch.tensor([0, 0, 1]), **change}
    batch = {key: value for key, value in batch.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        sparseft.select("gps", models.make("bert"), [batch], 0.01, **options)


def test_gps_has_nothing_to_say_about_embeddings_alone():
    with pytest.raises(ValueError, match="all selectable parameters are embeddings"):
        sparseft.select("gps", models.make("bert"), data("bert"), 0.1, include="*embeddings.weight")


@pytest.mark.parametrize("name", ["t5", "plain"])
def test_gps_asks_for_features_it_cannot_guess(name):
    if name == "plain":
        model, batch = torch.nn.Linear(4, 3), (torch.randn(4, 4), torch.tensor([0, 0, 1, 1]))
    else:
        model, batch = models.make("t5"), {**models.batch("t5", 4), "labels": torch.tensor([0, 0, 1, 1])}
    with pytest.raises(ValueError, match="pass `features`"):
        sparseft.select("gps", model, [batch], 0.1)


def input_norms(model, batches):
    """Return parameter name -> norm of each input of its linear layer over all tokens, one sample at a time."""
    squares, hooks = {}, []

    def watch(name, module):
        def hook(module, args):
            x = args[0].detach().double().reshape(-1, args[0].shape[-1])
            squares[name] = squares.get(name, 0) + x.square().sum(0)

        hooks.append(module.register_forward_pre_hook(hook))

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            watch(f"{name}.weight", module)
    model.eval()
    with torch.no_grad():
        for sample in one_by_one(batches):
            model(**sample)
    for hook in hooks:
        hook.remove()
    return {name: total.sqrt() for name, total in squares.items()}


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("name", ["bert", "gpt2 classification", "llama", "gpt2"])
def test_wanda_takes_the_weights_that_are_largest_with_their_inputs(name, device):
    batches, model = data(name), models.make(name)
    norms = input_norms(model, batches)
    parameters, turned = dict(model.named_parameters(remove_duplicate=False)), conv1d_weights(model)
    scores = {
        key: parameters[key].detach().double().abs() * (norm[:, None] if key in turned else norm)
        for key, norm in norms.items()
    }
    if name == "gpt2":  # the head is the embedding
        scores["transformer.wte.weight"] = scores.pop("lm_head.weight")
    on_device = models.make(name, device)
    for batch in batches:
        batch["attention_mask"] = batch["attention_mask"].to(device)
    mask = sparseft.select("wanda", on_device, batches, per_group=1)
    assert_best_of_rows(mask, scores, turned)
    assert set(mask.shapes) == set(dict(model.named_parameters()))
    assert set(mask.info["unscored"]) == set(mask.shapes) - set(scores)
    assert_best(sparseft.select("wanda", on_device, batches, k=300, scope="global"), scores, 300)


def test_wanda_sees_the_projections_of_multi_head_attention():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    batch = torch.randn(3, 5, 8)
    mask = sparseft.select("wanda", layer, [batch], per_group=1)
    wanted = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    assert set(mask) == wanted
    norms = batch.reshape(-1, 8).norm(dim=0)
    packed = sparseft.select("wanda", layer, [batch], per_group=1, include="*in_proj*")
    assert_best_of_rows(packed, {"self_attn.in_proj_weight": layer.self_attn.in_proj_weight.abs() * norms})


def test_wanda_names_what_is_wrong():
    bert, batch = models.make("bert"), models.batch("bert")
    with pytest.raises(ValueError, match="none of the selectable parameters is one that ran"):
        sparseft.select("wanda", bert, [batch], 0.1, include="*LayerNorm*")
    with pytest.raises(ValueError, match="samples must be at least 1"):
        sparseft.select("wanda", bert, [batch], 0.1, samples=0)
    with pytest.raises(ValueError, match="at least one sample"):
        sparseft.select("wanda", bert, [], 0.1)
    t5, batch = models.make("t5"), models.batch("t5")
    with pytest.raises(ValueError, match="cannot tell the decoder's padding"):
        sparseft.select("wanda", t5, [batch], 0.1)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    assert sparseft.select("wanda", t5, [batch], 0.1).k


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "deberta"])
def test_bitfit_takes_all_biases_and_nothing_else(name):
    model = models.make(name)
    parameters = dict(model.named_parameters())
    biases = [key for key in parameters if key.endswith(".bias")]
    if name == "t5":
        assert any("relative_attention_bias.weight" in key for key in parameters)
        with pytest.raises(ValueError, match=r"none of the .* is one; many decoders have none"):
            sparseft.select("bitfit", model)
        return
    mask = sparseft.select("bitfit", model, dense=biases[-1])
    assert list(mask) == biases[:-1]
    assert all(mask[key].tolist() == list(range(parameters[key].numel())) for key in mask)
    assert set(mask.shapes) == set(parameters) - {biases[-1]}
    assert mask.info["method"] == "bitfit"
    some = sparseft.select("bitfit", model, include="*0.*")
    assert list(some) == [key for key in biases if "0." in key]


def test_bitfit_knows_packed_and_recurrent_biases():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(4, 2)
            self.recurrent = torch.nn.LSTM(4, 3)
            self.biased_table = torch.nn.Parameter(torch.ones(3))

    assert set(sparseft.select("bitfit", Net())) == {
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "recurrent.bias_ih_l0",
        "recurrent.bias_hh_l0",
    }


def test_bitfit_has_no_budget():
    for given in ({"density": 0.1}, {"k": 3}, {"per_group": 1}, {"scope": "row"}, {"structure": "row"}):
        with pytest.raises(ValueError, match=f"takes all that it finds: leave {next(iter(given))} out"):
            sparseft.select("bitfit", models.make("bert"), **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "batches"}, 'fisher must be "sample" or "batch"'),
        ({"samples": 0}, "samples must be at least 1"),
        ({"max_norm": 1.0}, 'goes with fisher="batch"'),
        ({"fisher": "batch", "max_norm": math.inf}, "max_norm must be positive"),
    ],
)
def test_child_tuning_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        sparseft.select("child_tuning", models.make("bert"), data("bert"), 0.01, **options)


VARIANTS = {
    "child_tuning": {},
    "child_tuning of batches": {"fisher": "batch"},
    "gps": {"exclude": "classifier.*"},
    "snip": {},
    "wanda": {},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_choices_repeat_whatever_the_state_of_the_generator(variant):
    """In training mode, with dropout that must not matter."""
    masks = []
    for seed in (0, 1):
        model = models.make("bert")
        torch.manual_seed(seed)
        masks.append(sparseft.select(variant.split()[0], model, data("bert"), 0.02, **VARIANTS[variant]))
        assert model.training
    assert masks[0] == masks[1]
    excluded = "classifier" if variant == "gps" else "none"
    assert masks[0].n == sum(p.numel() for name, p in model.named_parameters() if not name.startswith(excluded))
    assert masks[0].k == int(0.02 * masks[0].n)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("structure", [None, "row"])
def test_models_in_bf16_are_chosen_from_too(variant, structure):
    model = models.make("bert", dtype=torch.bfloat16)
    options = {**VARIANTS[variant], "structure": structure}
    mask = sparseft.select(variant.split()[0], model, data("bert"), 0.05, **options)
    assert 0 < mask.k <= int(0.05 * mask.n)
    if structure is None:
        assert mask.k == int(0.05 * mask.n)
