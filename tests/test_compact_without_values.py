"""Leaves without values: there for their gradients alone, while an optimizer updates the weights themselves."""

import copy

import pytest
import torch
from compacts import inputs, mask_of, net
from optimizers import OPTIMIZERS

import sparseft

SETTINGS = {
    "stochastic": {"rounding": "stochastic", "seed": 3},
    "master": {"rounding": "master"},
    "8 bits": {"rounding": "stochastic", "state_bits": 8},
}
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
every_setting = pytest.mark.parametrize("setting", SETTINGS)
every_optimizer = pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])


def loss(model, step, dtype):
    return model(inputs(step, dtype)).float().square().mean()


def assert_trained_alike(compact, model, optimizer, other, plain, steps, dtype):
    """Train a model, and another one with dense gradients of the same values; they stay equal."""
    for step in steps:
        optimizer.zero_grad()
        loss(model, step, dtype).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for name, leaf in compact.entries.items():
            assert leaf.dtype == leaf.grad.dtype == dtype
            twin = other.get_parameter(name)
            twin.grad = torch.zeros_like(twin)
            twin.grad.view(-1)[leaf.positions.long()] = leaf.grad
        optimizer.step()
        plain.step()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name])


@every_dtype
@every_setting
@every_optimizer
def test_steps_are_those_on_gathered_gradients(name, setting, dtype):
    """The same weights, bit for bit, as the optimizer makes of dense gradients; also after a change of masks."""
    model = net(dtype)
    other = copy.deepcopy(model)
    first, second = mask_of(model), mask_of(model, seed=1)
    plain = OPTIMIZERS[name](first.param_groups(other), lr=1e-2, **SETTINGS[setting])
    with sparseft.compact_gradients(model, first, values=False) as compact:
        optimizer = OPTIMIZERS[name](first.param_groups(model), lr=1e-2, **SETTINGS[setting])
        assert_trained_alike(compact, model, optimizer, other, plain, range(4), dtype)
    with sparseft.compact_gradients(model, second, values=False) as compact:
        optimizer.set_mask(second, model)
        plain.set_mask(second, other)
        assert_trained_alike(compact, model, optimizer, other, plain, range(4, 8), dtype)


@pytest.mark.parametrize("bits", [32, 8])
def test_what_an_entry_costs(bits):
    """Index list and state: 10.1 bytes, or 4.2 with 8-bit states; with steps in backward no gradient is left over."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 256)).to(torch.bfloat16)
    mask = mask_of(model, density=0.05, include="*.weight")
    with sparseft.compact_gradients(model, mask, values=False) as compact:
        optimizer = sparseft.SparseAdamW(mask.param_groups(model), rounding="stochastic", state_bits=bits)
        with sparseft.step_in_backward(optimizer):
            model(torch.randn(4, 1024, dtype=torch.bfloat16)).float().square().mean().backward()
        kept = [*optimizer.param_groups[0]["indices"]]
        for leaf in compact.entries.values():
            assert leaf.grad is None
            assert leaf.dense.grad is None
            kept += [leaf, leaf.index_list, *optimizer.state[leaf].values()]
            kept += [way.where for way in (leaf.dense.selection.linear, leaf.dense.selection.conv1d)]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    assert sum(storages.values()) <= {32: 10.1, 8: 4.2}[bits] * mask.k


@every_setting
def test_a_run_goes_on_where_it_was_saved(setting):
    def run(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss(model, step, torch.bfloat16).backward()
            optimizer.step()

    model = net(torch.bfloat16)
    other, mask = copy.deepcopy(model), mask_of(model)
    compacts = [sparseft.compact_gradients(each, mask, values=False) for each in (model, other)]
    with compacts[0], compacts[1]:
        optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=1e-2, **SETTINGS[setting])
        run(model, optimizer, range(3))
        other.load_state_dict(model.state_dict())
        resumed = sparseft.SparseAdamW(mask.param_groups(other), lr=1.0)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(model, optimizer, range(3, 6))
        run(other, resumed, range(3, 6))
    for ours, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, twin)


def test_a_copied_optimizer_has_the_values():
    model = net(torch.bfloat16)
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask, values=False) as compact:
        optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=1e-2)
        copied = copy.deepcopy(optimizer)
    for leaf, param in zip(compact.entries.values(), copied.param_groups[0]["params"], strict=True):
        assert torch.equal(param, leaf.dense.detach().view(-1)[leaf.positions.long()])


def test_optimizers_of_other_packages_and_mixtures_are_refused():
    model = net(torch.bfloat16)
    mask, before = mask_of(model), copy.deepcopy(model.state_dict())
    with sparseft.compact_gradients(model, mask, values=False) as compact:
        optimizer = torch.optim.AdamW(compact.entries.values(), lr=1e-2)
        loss(model, 0, torch.bfloat16).backward()
        with pytest.raises(RuntimeError, match="leaves without values are for optimizers of this package"):
            optimizer.step()
        inner = sparseft.compact_gradients(model, mask)
        with pytest.raises(RuntimeError, match="or with other leaves"):
            inner.__enter__()
    with sparseft.compact_gradients(model, mask) as compact:
        assert {leaf.dtype for leaf in compact.entries.values()} == {torch.float32}
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
