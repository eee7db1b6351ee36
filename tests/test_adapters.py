"""Selection over LoRA parameters: the base stays frozen, and adapters are parameters like any others.

FISH over adapters is what FISH-Tuning does: arXiv 2504.04050.
"""

import models
import pytest
import torch
from models import one_thread  # noqa: F401

import sparseft

peft = pytest.importorskip("peft", reason="peft is not installed")


def adapted(name="bert", targets=("query", "value")):
    """A model with LoRA on some layers and weights in both of its factors, for B is zero at first."""
    config = peft.LoraConfig(r=4, target_modules=list(targets), lora_dropout=0.2)
    torch.manual_seed(1)
    model = peft.get_peft_model(models.make(name), config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.1)
    return model.train()


def adapters(model):
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def sample_squares(model, batch):
    """Mean over samples of the squared gradients of adapters, one backward pass each."""
    model.eval()
    squares = {name: torch.zeros_like(parameter) for name, parameter in adapters(model).items()}
    for n in range(len(batch["labels"])):
        loss = model(**{key: value[n : n + 1] for key, value in batch.items()}).loss
        grads = torch.autograd.grad(loss, list(adapters(model).values()))
        for total, grad in zip(squares.values(), grads, strict=True):
            total += grad.square() / len(batch["labels"])
    return squares


@pytest.mark.parametrize(("name", "targets"), [("bert", ("query", "value")), ("gpt2 classification", ("c_attn",))])
def test_fish_takes_the_largest_fisher_of_adapters_alone(name, targets):
    model, batch = adapted(name, targets), models.batch(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mask = sparseft.select("fish", model, [batch], k=100)
    assert set(mask.shapes) == set(adapters(model))
    assert mask.k == 100
    squares = sample_squares(adapted(name, targets), batch)
    flat = torch.cat([square.flatten() for square in squares.values()])
    bar = flat.sort().values[-100]
    for key, square in squares.items():
        chosen = torch.zeros(square.numel(), dtype=torch.bool)
        chosen[mask.get(key, torch.empty(0)).long()] = True
        assert (square.flatten()[chosen] >= bar * (1 - 1e-4)).all()
        assert (square.flatten()[~chosen] <= bar * (1 + 1e-4)).all()
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == set(adapters(model))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("child_tuning", {}),
        ("gps", {"per_group": 1}),
        ("gps", {"objective": "task"}),
        ("snip", {}),
        ("sift", {}),
        ("wanda", {}),
        ("magnitude", {"scope": "layer"}),
        ("random", {"structure": "row"}),
    ],
)
def test_every_method_chooses_among_adapters(method, options):
    batch = {**models.batch("bert", 6), "labels": torch.arange(6) % 3}
    budget = {} if "per_group" in options else {"density": 0.1}
    mask = sparseft.select(method, adapted(), [batch], **budget, **options)
    assert set(mask.shapes) == set(adapters(adapted()))
    assert 0 < mask.k <= 0.1 * mask.n or "per_group" in options


@pytest.mark.parametrize("compact", [False, True])
def test_training_changes_the_chosen_entries_of_adapters_and_nothing_else(compact):
    model, batch = adapted(), models.batch("bert")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    mask = sparseft.select("fish", model, [batch], density=0.1)
    with sparseft.compact_gradients(model, mask) if compact else torch.enable_grad():
        optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=0.01)
        for _ in range(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        changed = (parameter != before[name]).flatten().nonzero().flatten()
        assert set(changed.tolist()) <= set(mask.get(name, torch.empty(0)).tolist())
    assert sum(int((parameter != before[name]).sum()) for name, parameter in model.named_parameters()) > 0.9 * mask.k


def test_a_new_adapter_has_fisher_in_one_factor_only():
    """B is zero, so no gradient reaches A: the first choice is among B, unless the budget is larger."""
    model = peft.get_peft_model(models.make("bert"), peft.LoraConfig(r=4, target_modules=["query"]))
    mask = sparseft.select("fish", model, [models.batch("bert")], k=20)
    assert all("lora_B" in name for name in mask)
