"""Our optimizers on compact gradients: the weights behind leaves change in the step itself, as with dense ones."""

import copy

import pytest
import torch
from optimizers import OPTIMIZERS, OPTIONS, PLAIN, assert_same, weights

import sparseft

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
DTYPES = [torch.float32, torch.bfloat16]


def model_and_masks(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3)).to(dtype)
    masks = [sparseft.select("random", model, density=0.3, seed=seed, progress=False) for seed in (0, 1)]
    return model, masks


def give_gradients(model, mask, entries, step):
    """The same gradients to a model's parameters, or to the leaves of their selected entries."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in model.named_parameters():
        if "selected/" in name:
            continue
        grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        if entries is None:
            parameter.grad = grad
        elif name in mask:
            entries[name].grad = grad.view(-1)[mask[name].long()].float()


# a leaf is the master that stochastic rounding does without
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "stochastic" not in name])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leaves_train_as_parameters_do_and_through_a_change_of_the_mask(name, dtype):
    model, masks = model_and_masks(dtype)
    other = copy.deepcopy(model)
    plain = OPTIMIZERS[name](masks[0].param_groups(other), **OPTIONS[name])
    optimizer = None
    for first, mask in ((0, masks[0]), (5, masks[1])):
        with sparseft.compact_gradients(model, mask) as compact:
            if optimizer is None:
                optimizer = OPTIMIZERS[name](mask.param_groups(model), **OPTIONS[name])
            else:
                optimizer.set_mask(mask, model)
                plain.set_mask(mask, other)
            for step in range(first, first + 5):
                give_gradients(model, mask, compact.entries, step)
                give_gradients(other, mask, None, step)
                optimizer.step()
                plain.step()
            for entry_name, leaf in compact.entries.items():
                written = dict(model.named_parameters())[entry_name].detach().view(-1)[leaf.positions.long()]
                assert torch.equal(leaf.detach().to(dtype), written)
    assert_same(weights(model), weights(other))


@every_optimizer
def test_indices_are_those_of_the_leaves_and_take_no_room_of_their_own(name):
    model, (mask, _) = model_and_masks(torch.float32)
    with sparseft.compact_gradients(model, mask) as compact:
        optimizer = OPTIMIZERS[name](mask.param_groups(model), **OPTIONS[name])
        for leaf, index in zip(compact.entries.values(), optimizer.param_groups[0]["indices"], strict=True):
            assert index is leaf.index_list


@pytest.mark.parametrize("name", PLAIN)
def test_a_state_goes_from_dense_gradients_to_compact_ones(name):
    model, (mask, other_mask) = model_and_masks(torch.float32)
    optimizer = OPTIMIZERS[name](mask.param_groups(model), **OPTIONS[name])
    for step in range(3):
        give_gradients(model, mask, None, step)
        optimizer.step()
    other = copy.deepcopy(model)
    with sparseft.compact_gradients(other, mask) as compact:
        resumed = OPTIMIZERS[name](mask.param_groups(other), **OPTIONS[name])
        resumed.load_state_dict(optimizer.state_dict())
        for step in range(3, 6):
            give_gradients(model, mask, None, step)
            give_gradients(other, mask, compact.entries, step)
            optimizer.step()
            resumed.step()
    assert_same(weights(model), weights(other))
    with sparseft.compact_gradients(other, other_mask):
        resumed = OPTIMIZERS[name](other_mask.param_groups(other), **OPTIONS[name])
        with pytest.raises(ValueError, match="whose entries are not those of its index list"):
            resumed.load_state_dict(optimizer.state_dict())


@every_optimizer
def test_a_copy_trains_the_copied_leaves_alone(name):
    model, (mask, _) = model_and_masks(torch.bfloat16)
    with sparseft.compact_gradients(model, mask) as compact:
        optimizer = OPTIMIZERS[name](mask.param_groups(model), **OPTIONS[name])
        give_gradients(model, mask, compact.entries, 0)
        optimizer.step()
        copied = copy.deepcopy(optimizer)
        before = weights(model)
        leaves = copied.param_groups[0]["params"]
        start = weights(torch.nn.ParameterList(leaves))
        for leaf in leaves:
            leaf.grad = torch.ones_like(leaf)
        copied.step()
        assert_same(before, weights(model))
        assert all(bool((leaf != old).all()) for leaf, old in zip(leaves, start, strict=True))
