"""Compact gradients of a base whose layers have adapters of peft: everything that trains gets its gradient."""

import copy

import models
import pytest
import torch
from compacts import every_optimizer
from models import one_thread  # noqa: F401

import sparseft

peft = pytest.importorskip("peft", reason="peers are installed by `make bench`")


def adapted():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=False)
    model = peft.get_peft_model(models.make("bert").eval(), config)
    for name, parameter in model.named_parameters():
        if "base_layer" in name or "value" in name:
            parameter.requires_grad_(True)
    mask = sparseft.select("random", model, density=0.1, include=["*base_layer*", "*value*"], dense="*lora_*")
    return model, mask


def test_gradients_are_those_of_dense_ones():
    model, mask = adapted()
    dense = copy.deepcopy(model)
    batch = models.batch("bert")
    dense(**batch).loss.backward()
    want = {name: p.grad for name, p in dense.named_parameters()}
    with sparseft.compact_gradients(model, mask) as compact:
        model(**batch).loss.backward()
        assert any("base_layer.weight" in name for name in compact.entries)
        for name, leaf in compact.entries.items():
            torch.testing.assert_close(leaf.grad, want[name].reshape(-1)[mask[name].long()], rtol=1e-4, atol=1e-6)
        assert len(mask.dense) > 8
        for name in mask.dense:
            torch.testing.assert_close(model.get_parameter(name).grad, want[name], rtol=1e-4, atol=1e-6)


@every_optimizer
def test_both_train_and_nothing_else(make_optimizer):
    model, mask = adapted()
    before = copy.deepcopy(model.state_dict())
    with sparseft.compact_gradients(model, mask):
        optimizer = make_optimizer(mask.param_groups(model))
        assert [group["name"] for group in optimizer.param_groups] == ["selected", "dense"]
        for seed in range(2):
            model(**models.batch("bert", seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in model.state_dict().items():
        changed = set((value != before[name]).reshape(-1).nonzero()[:, 0].tolist())
        assert changed <= set(mask[name].tolist() if name in mask else range(value.numel())), name
        assert bool(changed) == (name in mask or name in mask.dense), name
