"""A mask changes in the middle of training: entries that stay go on, new ones begin, nothing else moves."""

import copy

import pytest
import torch
from optimizers import OPTIMIZERS, OPTIONS, assert_same, train, weights

import sparseft
from sparseft import low_bits
from sparseft.index_lists import positions
from sparseft.optim.mask_change import Move

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def model_and_masks(dtype=torch.float32, device="cpu"):
    """A small net; two masks that share a part of their entries. Only the second has the last weight."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3)).to(device, dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    masks = []
    for left_out in ("2.weight", "0.bias"):
        chosen = {name: torch.rand(shape.numel(), generator=generator) < 0.5 for name, shape in shapes.items()}
        indices = {name: entries.nonzero().flatten().int() for name, entries in chosen.items() if name != left_out}
        masks.append(sparseft.Mask(indices, shapes))
    return model, masks


def by_position(optimizer, model):
    """Return {(parameter's name, state's name): {position: value}} of all states with one value an entry."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter, index in zip(group["params"], group["indices"], strict=True):
            index = positions(index, parameter.numel())
            states = dict(optimizer.state.get(parameter, {}))
            scales = states.pop("scales", None)
            for key, state in states.items():
                if state.dtype == torch.uint8:
                    squares = key == "exp_avg_sq"
                    state = low_bits.decode(state, scales[int(squares)], squares)
                if key != "step":
                    found[names[parameter], key] = dict(zip(index.tolist(), state.tolist(), strict=True))
    return found


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_follows_its_entries(name, dtype):
    model, (first, second) = model_and_masks(dtype)
    optimizer = OPTIMIZERS[name](first.param_groups(model), **OPTIONS[name])
    train(model, optimizer, 5)
    before, old = weights(model), by_position(optimizer, model)
    optimizer.set_mask(second, model)
    assert_same(before, weights(model))

    parameters = dict(model.named_parameters())
    new = by_position(optimizer, model)
    assert {parameter for parameter, _ in new} == {"0.weight", "2.bias"}
    kept = begun = 0
    for (parameter, key), states in new.items():
        assert list(states) == second[parameter].tolist()
        for position, value in states.items():
            if position in old[parameter, key]:
                # 8 bits keep a digit, and so do they when they are rounded anew
                exact = "8 bits" not in name or key in ("master", "pretrained")
                assert value == pytest.approx(old[parameter, key][position], rel=0 if exact else 0.1, abs=1e-30)
                kept += 1
            else:
                current = float(parameters[parameter].detach().view(-1)[position])
                assert value == (current if key in ("master", "pretrained") else 0)
                begun += 1
    assert min(kept, begun) > 200
    assert float(optimizer.state[parameters["0.weight"]]["step"]) == 5
    assert parameters["0.bias"] not in optimizer.state
    assert parameters["2.weight"] not in optimizer.state


@every_optimizer
def test_only_the_new_entries_train_from_then_on(name):
    model, (first, second) = model_and_masks()
    optimizer = OPTIMIZERS[name](first.param_groups(model), **OPTIONS[name])
    train(model, optimizer, 3)
    optimizer.set_mask(second, model)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    train(model, optimizer, 3)
    for key, parameter in model.named_parameters():
        moved = (parameter.detach() != before[key]).view(-1).nonzero().flatten().int()
        assert torch.equal(moved, second[key] if key in second else moved[:0])


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_mask_changes_nothing(name, dtype):
    model, (mask, _) = model_and_masks(dtype)
    other = copy.deepcopy(model)
    optimizers = [OPTIMIZERS[name](mask.param_groups(net), **OPTIONS[name]) for net in (model, other)]
    for net, optimizer in zip((model, other), optimizers, strict=True):
        train(net, optimizer, 3)
    optimizers[0].set_mask(mask, model)
    for net, optimizer in zip((model, other), optimizers, strict=True):
        train(net, optimizer, 3, seed=1)
    assert_same(weights(model), weights(other))


@every_optimizer
def test_a_run_resumes_with_the_mask_it_has_come_to(name):
    model, (first, second) = model_and_masks()
    optimizer = OPTIMIZERS[name](first.param_groups(model), **OPTIONS[name])
    train(model, optimizer, 3)
    optimizer.set_mask(second, model)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    resumed = OPTIMIZERS[name](second.param_groups(other), **OPTIONS[name])
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 3, seed=1)
    train(other, resumed, 3, seed=1)
    assert_same(weights(model), weights(other))


def test_parameters_stay_in_their_groups_and_new_ones_find_one():
    model, (first, second) = model_and_masks()
    whole = torch.nn.Parameter(torch.randn(7))
    head = sparseft.Mask(dict(second), {**second.shapes, "0.bias": (30,)}, dense={})
    groups = [
        {"params": [model[2].bias], "indices": [first["2.bias"]], "lr": 0.5},
        {"params": [model[0].weight, model[0].bias], "indices": [first["0.weight"], first["0.bias"]], "lr": 0.1},
        {"name": "selected", "params": [whole], "lr": 0.2},
    ]
    optimizer = sparseft.SparseAdamW(groups, lr=1.0)
    optimizer.set_mask(head, model)
    held = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    assert held == [[id(model[2].bias)], [id(model[0].weight)], [id(whole), id(model[2].weight)]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1, 0.2]
    assert positions(optimizer.param_groups[2]["indices"][0], 7).tolist() == list(range(7))


def test_parameters_that_left_come_back_to_their_groups():
    model, (first, second) = model_and_masks()
    groups = [{"params": [model[0].weight, model[2].weight], "lr": 0.5}, {"params": [model[0].bias, model[2].bias]}]
    optimizer = sparseft.SparseAdamW(groups, lr=1.0)
    for mask in (second, first, second, first.union(second)):  # without the first bias, without the last weight
        optimizer.set_mask(mask, model)
    held = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    assert held == [[id(model[0].weight), id(model[2].weight)], [id(model[0].bias), id(model[2].bias)]]


def test_named_parameters_keep_the_right_names():
    model, (_, second) = model_and_masks()
    optimizer = sparseft.SparseSGD(model.named_parameters())
    optimizer.set_mask(second, model)
    assert optimizer.param_groups[0]["param_names"] == list(second)


@every_optimizer
def test_a_mask_that_does_not_fit_changes_nothing(name):
    model, (first, second) = model_and_masks()
    optimizer = OPTIMIZERS[name](first.param_groups(model), **OPTIONS[name])
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="the mask is of another model"):
        optimizer.set_mask(second, torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match="the optimizer trains none of the parameters of Mask"):
        optimizer.set_mask(second, copy.deepcopy(model))
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"got frozen \[2.weight\]"):
        optimizer.set_mask(second, model)
    after = optimizer.state_dict()
    assert str(before["param_groups"]) == str(after["param_groups"])
    for key, state in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in state.items())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("old", "new"), [(40, 40), (40, 60), (60, 40), (None, 40), (40, None), (1, 60), (None, None)])
def test_entries_that_stay_are_found_in_lists_of_any_kind(old, new, dtype):
    generator = torch.Generator().manual_seed(1)

    def entries(count):
        if count is None:
            return torch.randperm(70, generator=generator)[:30].sort().values.to(dtype)
        return torch.arange(count, dtype=dtype)

    old, new = entries(old), entries(new)
    move = Move.between(old, new)
    assert move.stays.tolist() == [entry in set(old.tolist()) for entry in new.tolist()]
    assert torch.equal(old[move.source], new[move.stays])
    assert move.nowhere == (old.tolist() == new.tolist())
