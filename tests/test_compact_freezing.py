"""Weights that are frozen while their gradients are compact stop training, and unfrozen they go on."""

import copy
import warnings

import models
import pytest
import torch
from compacts import every_optimizer, inputs, mask_of, net
from models import one_thread  # noqa: F401
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparseft


def by_method(module, trains):
    module.weight.requires_grad_(trains)


def by_attribute(module, trains):
    module.weight.requires_grad = trains


def by_module(module, trains):
    module.requires_grad_(trains)


@every_optimizer
@pytest.mark.parametrize("freeze", [by_method, by_attribute, by_module])
@pytest.mark.filterwarnings("ignore:a parameter of shape .* is frozen")
def test_frozen_weights_stay_and_go_on_when_unfrozen(make_optimizer, freeze):
    model = net()
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask) as compact:
        optimizer = make_optimizer(mask.param_groups(model))

        def step():
            """Return the names of the weights that changed."""
            before = copy.deepcopy(model.state_dict())
            model(inputs()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}

        assert step() == set(mask)
        freeze(model[0], False)
        frozen = {"0.weight", "0.bias"} & set(mask) if freeze is by_module else {"0.weight"}
        assert not any(compact.entries[name].requires_grad for name in frozen)
        assert step() == set(mask) - frozen
        freeze(model[0], True)
        assert step() == set(mask)


def test_it_is_the_gradient_with_the_others_frozen():
    model = net()
    mask = mask_of(model)
    model[0].requires_grad_(False)
    model(inputs()).square().mean().backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    model[0].requires_grad_(True)
    model.zero_grad()
    with sparseft.compact_gradients(model, mask) as compact:
        model[0].requires_grad_(False)
        model(inputs()).square().mean().backward()
        for name, leaf in compact.entries.items():
            if want[name] is None:
                assert leaf.grad is None
            else:
                torch.testing.assert_close(leaf.grad, want[name].view(-1)[mask[name].long()])


def test_a_frozen_layer_keeps_no_input():
    model = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 4))
    kept = []
    with sparseft.compact_gradients(model, mask_of(model, 0.9)):
        model[0].weight.requires_grad_(False)
        x = inputs()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            model(x)
    assert x.shape not in kept


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_all_kinds_of_layers(name):
    """Layers, embeddings, norms: with everything frozen but one block, the block alone has gradients."""
    model = models.make(name).eval()
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask) as compact:
        chosen = [key for key in mask if ".1." in key]
        for key in mask:
            model.get_parameter(key).requires_grad_(key in chosen)
        model(**models.batch(name)).loss.backward()
        assert 0 < len(chosen) < len(mask)
        assert [key for key, leaf in compact.entries.items() if leaf.grad is not None] == chosen


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model = nn.Sequential(nn.Linear(12, 12), net())
    with sparseft.compact_gradients(model, mask_of(model)) as compact:
        model[1][0].requires_grad_(False)
        checkpoint(model[1], model[0](inputs()), use_reentrant=reentrant).square().sum().backward()
        frozen = {"1.0.weight", "1.0.bias"}
        assert {name for name, leaf in compact.entries.items() if leaf.grad is None} == frozen & set(compact.entries)


def test_a_compiled_model_follows():
    model = net()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with sparseft.compact_gradients(model, mask_of(model)) as compact:
        for trains in (True, False, True):
            model[0].weight.requires_grad_(trains)
            compiled(inputs()).square().mean().backward()
            grads = {name: leaf.grad for name, leaf in compact.entries.items()}
            assert (grads.pop("0.weight") is not None) == trains
            assert all(grad is not None for grad in grads.values())
            model.zero_grad()
    torch._dynamo.reset()


def test_a_function_that_no_rule_is_asked_about():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x)
            return x @ weight.T

        @staticmethod
        def backward(ctx, grad):
            return None, grad.T @ ctx.saved_tensors[0]

    model = net()
    with sparseft.compact_gradients(model, mask_of(model)) as compact:
        for trains in (False, True):
            model[0].weight.requires_grad_(trains)
            (Product.apply(inputs(), model[0].weight).sum() + model[0].bias.sum()).backward()
            assert (compact.entries["0.weight"].grad is not None) == trains
            assert model[0].weight.grad is None


def test_frozen_outside_stays_frozen_inside_and_the_other_way_round():
    model = net()
    mask = mask_of(model)
    context = sparseft.compact_gradients(model, mask)
    with context:
        model[0].weight.requires_grad_(False)
        copied = copy.deepcopy(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.weight"]
    assert [name for name, p in copied.named_parameters() if not p.requires_grad] == ["0.weight"]
    with context:
        model(inputs()).sum().backward()
        assert context.entries["0.weight"].grad is None
        assert context.entries["3.weight"].grad is not None
    model[0].weight.requires_grad_(True)
    with context:
        model(inputs()).sum().backward()
        assert context.entries["0.weight"].grad is not None


@every_optimizer
@pytest.mark.filterwarnings("ignore:a parameter of shape .* is frozen")
def test_the_last_module_frozen_as_a_whole_is_warned_of(make_optimizer):
    """It has the leaves of all: whoever goes through its parameters freezes them too."""
    model = net()
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask):
        optimizer = make_optimizer(mask.param_groups(model))
        model[3].requires_grad_(False)
        with pytest.warns(UserWarning, match=r"entries of 4 parameters, 0.weight the first, are frozen and their"):
            optimizer.step()
        for module in model:
            module.requires_grad_(True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()


def test_an_optimizer_of_this_package_warns():
    model = net()
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask):
        optimizer = sparseft.SparseAdamW(mask.param_groups(model))
        model[0].weight.requires_grad_(False)
        model(inputs()).sum().backward()
        with pytest.warns(UserWarning, match="selected entries is frozen"):
            optimizer.step()
