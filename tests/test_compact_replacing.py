"""Parameters that are replaced while gradients are compact: followed, or refused at that moment."""

import copy

import models
import pytest
import torch
from compacts import every_optimizer, inputs, mask_of, net
from models import one_thread  # noqa: F401
from torch import nn

import sparseft
from sparseft.entries import SelectedEntries
from sparseft.mask import Mask


def assign(model, values):
    model.load_state_dict(values, assign=True)


def assign_by_module(model, values):
    for prefix, module in model.named_children():
        own = {key.removeprefix(f"{prefix}."): value for key, value in values.items() if key.startswith(f"{prefix}.")}
        module.load_state_dict(own, assign=True)


def set_each(model, values):
    for name, value in values.items():
        owner, _, attribute = name.rpartition(".")
        trains = model.get_parameter(name).requires_grad
        setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=trains))


def copied(model, values):
    model.load_state_dict(values)


def trained(make_optimizer, replace, dtype):
    """Two steps, other weights, two more; return the model and what was seen on the way."""
    model, other = net(dtype), net(dtype)
    mask = mask_of(model, dense=["3.*"])
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(dtype))
    values = {name: value.detach().clone() for name, value in other.state_dict().items()}
    with sparseft.compact_gradients(model, mask) as compact:
        optimizer = make_optimizer(mask.param_groups(model))
        held = {name: p for name, p in model.named_parameters() if name in mask or name in mask.dense}
        for step in range(4):
            if step == 2:
                replace(model, values)
                assert all(torch.equal(model.state_dict()[name], value) for name, value in values.items())
                for name, leaf in compact.entries.items():
                    assert torch.equal(leaf.detach(), values[name].view(-1)[mask[name].long()].float())
            model(inputs(step, dtype)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        now = dict(model.named_parameters())
        assert all(now[name] is p for name, p in held.items())
        assert any(isinstance(p, SelectedEntries) for p in now.values())
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert not torch.equal(model[0].weight, other[0].weight)
    assert not torch.equal(model[3].weight, other[3].weight)
    return model


@every_optimizer
@pytest.mark.parametrize("replace", [assign, assign_by_module, set_each])
def test_replacing_is_as_good_as_copying(make_optimizer, replace):
    got, want = (trained(make_optimizer, each, torch.float32) for each in (replace, copied))
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))


def test_replacing_in_low_precision():
    got, want = (trained(sparseft.SparseAdamW, each, torch.bfloat16) for each in (assign, copied))
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))


def test_tied_parameters_stay_tied():
    model = models.make("bert masked")
    values = copy.deepcopy(model.state_dict())
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask) as compact:
        model.load_state_dict({name: value + 1 for name, value in values.items()}, assign=True)
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        model(**models.batch("bert masked")).loss.backward()
        assert compact.entries["bert.embeddings.word_embeddings.weight"].grad.abs().sum() > 0


def test_what_is_registered_goes_on_sharing_its_memory():
    model = net()
    new = nn.Parameter(torch.empty(24, 12))
    with sparseft.compact_gradients(model, mask_of(model)):
        model[0].weight = new
        nn.init.constant_(new, 0.5)
    assert bool((model[0].weight == 0.5).all())


def test_a_graph_from_before_is_refused():
    """Backward would multiply by other weights than forward did."""
    model = net()
    with sparseft.compact_gradients(model, mask_of(model)):
        loss = model(inputs()).square().mean()
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_is_not_trained_is_left_to_torch():
    model = net()
    mask = mask_of(model, include=["0.*"])
    new = nn.Parameter(torch.ones(4, 24))
    with sparseft.compact_gradients(model, mask):
        model[3].weight = new
        assert model[3].weight is new
    assert new.requires_grad


class Special(nn.Parameter):
    pass


def of_another_class(model):
    return Special(torch.zeros(24, 12)), "0.weight trains .* by a plain parameter only, got Special"


def another_compact_one(model):
    return model[1].weight, "0.weight trains .* by a plain parameter only, got CompactParameter"


def of_another_dtype(model):
    return nn.Parameter(torch.zeros(24, 12, dtype=torch.bfloat16)), "0.weight trains .* got torch.bfloat16"


def of_another_shape(model):
    return nn.Parameter(torch.zeros(30, 12)), r"0.weight trains .* got torch.float32 \[30, 12\]"


def on_another_device(model):
    return nn.Parameter(torch.zeros(24, 12, device="meta")), "0.weight trains .* on meta"


def with_gaps(model):
    return nn.Parameter(torch.zeros(12, 24).T), r"0.weight trains .* strides \(1, 24\)"


def shared(model):
    return nn.Parameter(model[2].weight.detach()[:]), "0.weight trains .* shares memory with 2.weight"


@pytest.mark.parametrize(
    "make",
    [of_another_class, another_compact_one, of_another_dtype, of_another_shape, on_another_device, with_gaps, shared],
)
def test_what_cannot_be_followed_is_refused_and_changes_nothing(make):
    model = nn.Sequential(nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(12, 24))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    mask = Mask({"0.weight": torch.tensor([0, 3]), "1.weight": torch.tensor([5])}, shapes)
    before = copy.deepcopy(model.state_dict())
    with sparseft.compact_gradients(model, mask):
        held = model[0].weight
        new, message = make(model)
        with pytest.raises(RuntimeError, match=message):
            model[0].weight = new
        assert model[0].weight is held
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_state_of_another_dtype_is_refused_with_the_remedy():
    model = net()
    state = {name: value.bfloat16() for name, value in model.state_dict().items()}
    with sparseft.compact_gradients(model, mask_of(model)):
        with pytest.raises(RuntimeError, match=r"got torch.bfloat16 .* load without assign=True"):
            model.load_state_dict(state, assign=True)
        model.load_state_dict(state)


@pytest.mark.parametrize("prefix", ["", "0."])
def test_swapping_tensors_is_refused(prefix):
    """It exchanges the classes and attributes of two tensors: what is compact would silently be so no more."""
    model = net()
    part = model.get_submodule(prefix[:-1])
    state = {name: value + 1 for name, value in part.state_dict().items()}
    with sparseft.compact_gradients(model, mask_of(model)) as compact:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with pytest.raises(RuntimeError, match="Cannot swap"):
                part.load_state_dict(state)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        model(inputs()).sum().backward()
        assert all(leaf.grad is not None for leaf in compact.entries.values())
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_two_models_at_once():
    one, two = net(), net()
    mask = mask_of(one)
    state = {name: value + 1 for name, value in two.state_dict().items()}
    with sparseft.compact_gradients(one, mask) as first, sparseft.compact_gradients(two, mask) as second:
        two.load_state_dict(state, assign=True)
        for name, leaf in second.entries.items():
            assert torch.equal(leaf.detach(), state[name].view(-1)[mask[name].long()])
            assert not torch.equal(leaf, first.entries[name])
