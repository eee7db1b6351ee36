"""What compact gradients cannot serve is refused with the reason, and left as it was."""

import copy
import warnings

import pytest
import torch
from compacts import every_optimizer, inputs, mask_of, net
from models import one_thread  # noqa: F401
from torch import nn

import sparseft
from sparseft.mask import Mask

# what must be refused at the next step, and the part of the error that tells it
CHANGES = {
    "replaced": "0.weight was replaced inside compact_gradients",
    "resized": "moved, resized or converted",
    "converted": "moved, resized or converted",
}


@every_optimizer
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_changed_inside_is_refused_before_the_step(make_optimizer, change):
    model = net()
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask):
        optimizer = make_optimizer(mask.param_groups(model))
        model(inputs()).sum().backward()
        old = model[0]
        if change == "replaced":
            model[0] = nn.Linear(12, 24)
        elif change == "resized":
            old.weight.data = torch.zeros(30, 12)
        else:
            old.weight.data = old.weight.data.double()
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=CHANGES[change]):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert type(old.weight) is nn.Parameter


@every_optimizer
def test_a_layer_that_trains_whole_and_was_replaced_inside_is_refused_before_the_step(make_optimizer):
    model = net()
    mask = mask_of(model, dense=["3.*"])
    old = model[3]
    with sparseft.compact_gradients(model, mask):
        optimizer = make_optimizer(mask.param_groups(model))
        model[3] = nn.Linear(24, 4)
        model(inputs()).sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=r"3\.weight was replaced inside compact_gradients, and would not"):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        model[3] = old
        optimizer.step()
    # outside, optimizers are not looked at
    model[3] = nn.Linear(24, 4)
    torch.optim.SGD(old.parameters(), lr=0.1).step()


class Special(nn.Parameter):
    pass


def shared_memory():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = nn.Parameter(model[0].weight.detach()[:, :])
    return model, RuntimeError, "0.weight and 1.weight share memory|1.weight and 0.weight share memory"


def special_class():
    model = nn.Linear(6, 6)
    model.weight = Special(torch.randn(6, 6))
    return model, TypeError, "weight must be a plain parameter, got Special; quantised and sharded"


def fp64():
    return nn.Linear(6, 6).double(), TypeError, "must be contiguous and fp32, bf16 or fp16, got torch.float64"


def strided():
    model = nn.Linear(6, 5)
    model.weight = nn.Parameter(torch.randn(6, 5).T)
    return model, TypeError, "must be contiguous"


def frozen():
    model = nn.Linear(6, 6)
    model.weight.requires_grad_(False)
    return model, ValueError, "weight has selected entries but is frozen"


@pytest.mark.parametrize("make", [shared_memory, special_class, fp64, strided, frozen])
def test_what_cannot_be_served_is_refused_and_left_alone(make):
    model, kind, message = make()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    mask = Mask({name: torch.tensor([0, 3]) for name in shapes if "weight" in name}, shapes)
    before = {name: (id(p), type(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(kind, match=message):
        sparseft.compact_gradients(model, mask).__enter__()
    assert before == {name: (id(p), type(p), p.requires_grad) for name, p in model.named_parameters()}


def test_masks_that_do_not_fit():
    model = net()
    with pytest.raises(ValueError, match="the mask is of another model"):
        sparseft.compact_gradients(model, mask_of(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="neither selected entries nor dense"):
        sparseft.compact_gradients(model, Mask({}, {name: p.shape for name, p in model.named_parameters()}))
    with pytest.raises(TypeError, match="must not be wrapped yet, got DataParallel"):
        sparseft.compact_gradients(nn.DataParallel(model), mask_of(model))


def test_an_embedding_that_renormalises_is_refused():
    model = nn.Embedding(10, 4, max_norm=1.0)
    mask = mask_of(model)
    with pytest.raises(ValueError, match="max_norm"), sparseft.compact_gradients(model, mask):
        model(torch.tensor([1, 2]))


def test_selection_wants_the_dense_parameters():
    model = net()
    mask = mask_of(model)
    data = [{"x": inputs()}]
    with sparseft.compact_gradients(model, mask):
        with pytest.raises(RuntimeError, match="leave compact_gradients first"):
            sparseft.estimate_fisher(model, data, loss=lambda model, batch: model(batch["x"]).square().mean(1))
        with pytest.raises(RuntimeError, match="leave compact_gradients first"):
            mask_of(model)


@every_optimizer
def test_leaves_whose_context_was_left_are_refused(make_optimizer):
    model = net()
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask):
        optimizer = make_optimizer(mask.param_groups(model))
        model(inputs()).sum().backward()
    with pytest.raises(RuntimeError, match="compact_gradients was left, or is of another mask"):
        optimizer.step()


@pytest.mark.parametrize("make", [sparseft.SparseAdamW, torch.optim.SGD])
def test_an_optimizer_made_before_is_refused_and_one_of_all_parameters_is_not(make):
    model = net()
    mask = mask_of(model)
    groups = mask.param_groups(model) if make is sparseft.SparseAdamW else list(model.parameters())
    before = make(groups, lr=0.1)
    with sparseft.compact_gradients(model, mask):
        model(inputs()).sum().backward()
        weights = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="make the optimizer inside compact_gradients"):
            before.step()
        assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
        make(model.parameters(), lr=0.1).step()
        assert not torch.equal(weights["0.weight"], model.state_dict()["0.weight"])


def test_what_was_frozen_when_an_optimizer_was_made_is_not_warned_of():
    """As the weights beside the leaves are, in the optimizer that refusals advise to make."""
    model = net()
    with sparseft.compact_gradients(model, mask_of(model, include="0.weight")), warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, before = sparseft.SparseAdamW(model.parameters()), model.state_dict()["0.weight"].clone()
        model(inputs()).sum().backward()
        optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_what_was_frozen_since_is_warned_of():
    model = net()
    optimizer = sparseft.SparseAdamW(model.parameters())
    model[0].weight.requires_grad_(False)
    model(inputs()).sum().backward()
    with pytest.warns(UserWarning, match=r"a parameter of shape \[24, 12\] with 288 selected entries is frozen"):
        optimizer.step()


@pytest.mark.parametrize("other", [None, "best.mask", torch.nn.Linear(2, 2)])
def test_what_is_no_mask_is_refused(other):
    with pytest.raises(TypeError, match=r"mask must be a sparseft\.Mask, got (NoneType|str|Linear); .* Mask.load"):
        sparseft.compact_gradients(torch.nn.Linear(2, 2), other)
