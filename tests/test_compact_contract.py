"""Compact gradients and the world around them: optimizers, clipping, scaling, files and copies."""

import contextlib
import copy
import pickle

import models
import pytest
import torch
from compacts import every_optimizer, inputs, mask_of, net
from models import one_thread  # noqa: F401
from torch import nn

import sparseft
from sparseft.compact import linear as compact_linear
from sparseft.compact import parameter as compact_parameter
from sparseft.entries import SelectedEntries
from sparseft.index_lists import positions
from sparseft.mask import Mask


@pytest.fixture
def reference_arithmetic(monkeypatch):
    """Products as torch's own linear layers make them: a dense one, of which the selected entries are taken."""

    def selected_grad_(grad, x, dy, indices):
        product = dy.T @ x
        grad += product.reshape(-1)[positions(indices, product.numel()).long()]

    monkeypatch.setattr(compact_linear.torch.ops.sparseft, "selected_grad_", selected_grad_)
    monkeypatch.setattr("sparseft.products.prefer_onednn", lambda: False)


@every_optimizer
@pytest.mark.parametrize("arithmetic", ["reference", "fast"])
def test_fifty_steps_equal_those_with_dense_gradients(make_optimizer, arithmetic, request):
    """With accumulation, clipping and a schedule, on a BERT: the same weights at the end."""
    if arithmetic == "reference":
        request.getfixturevalue("reference_arithmetic")
    compact = models.make("bert").eval()
    # a key's bias has no gradient but rounding, which AdamW makes steps of
    mask = mask_of(compact, 0.05, dense=("classifier.*",), exclude=["*.key.bias"])
    dense = copy.deepcopy(compact)

    def steps(model, optimizer, clipped, after_backward):
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 20)
        for step in range(50):
            for part in range(2):
                (model(**models.batch("bert", seed=2 * step + part)).loss / 2).backward()
            after_backward()
            torch.nn.utils.clip_grad_norm_(clipped, 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            model.zero_grad()

    with sparseft.compact_gradients(compact, mask):
        optimizer = make_optimizer(mask.param_groups(compact))
        steps(compact, optimizer, list(compact.parameters()), lambda: None)

    # the oracle: ordinary gradients, gathered; the optimizer works on vectors, which are then put into the weights
    weights = dict(dense.named_parameters())
    for name, weight in weights.items():
        weight.requires_grad_(name in mask or name in mask.dense)
    vectors = {name: nn.Parameter(weights[name].detach().view(-1)[mask[name].long()].clone()) for name in mask}
    wholes = [weights[name] for name in mask.dense]

    def gathered():
        for name, vector in vectors.items():
            grad = weights[name].grad
            vector.grad = None if grad is None else grad.view(-1)[mask[name].long()]

    optimizer = make_optimizer([{"params": list(vectors.values())}, {"params": wholes}])

    @torch.no_grad()
    def scattered(*args):
        for name, vector in vectors.items():
            weights[name].view(-1)[mask[name].long()] = vector

    optimizer.register_step_post_hook(scattered)
    steps(dense, optimizer, [*wholes, *vectors.values()], gathered)
    moved = 0.0
    base = dict(models.make("bert").named_parameters())
    for name, weight in dense.named_parameters():
        got = dict(compact.named_parameters())[name]
        moved = max(moved, float((weight - base[name]).abs().max()))
        if arithmetic == "reference":
            assert torch.equal(got, weight), name
        else:
            torch.testing.assert_close(got, weight, rtol=1e-3, atol=2e-4)
    assert moved > 1e-3


@every_optimizer
def test_nothing_outside_the_mask_moves_and_leaves_follow(make_optimizer):
    model = net()
    mask, before = mask_of(model), copy.deepcopy(model.state_dict())
    with sparseft.compact_gradients(model, mask) as compact:
        optimizer = make_optimizer(mask.param_groups(model))
        for step in range(3):
            model(inputs(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, leaf in compact.entries.items():
            weight = model.get_parameter(name).detach().reshape(-1)
            assert torch.equal(weight[mask[name].long()], leaf.detach())
    for name, weight in model.state_dict().items():
        changed = (weight != before[name]).reshape(-1).nonzero()[:, 0]
        assert set(changed.tolist()) <= set(mask[name].tolist() if name in mask else [])
        assert len(changed) or name not in mask


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_leaves_are_the_master_copy_of_low_precision_weights(make_optimizer, dtype):
    """Steps too small to show in the weights add up in the leaves."""
    model = net(dtype)
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask) as compact:
        optimizer = make_optimizer(mask.param_groups(model))
        for group in optimizer.param_groups:
            group["lr"] = 1e-5
        for _ in range(20):
            (model(inputs(dtype=dtype)).float().sum() * 100).backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, leaf in compact.entries.items():
            weight = model.get_parameter(name).detach().reshape(-1)[mask[name].long()]
            assert torch.equal(weight, leaf.detach().to(dtype))
            assert not torch.equal(weight.float(), leaf.detach()), "the leaf has no more digits than the weight"


def test_grad_scaler():
    model = net()
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask) as compact:
        optimizer = torch.optim.AdamW(mask.param_groups(model), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(model(inputs()).square().mean()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        before = copy.deepcopy(model.state_dict())
        scaler.scale(model(inputs() * float("inf")).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
        assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
        assert compact.entries.keys() == mask.keys()


def test_files_and_copies_do_not_know_of_it(tmp_path):
    model = nn.ModuleDict({"inner": net()})
    inner = model["inner"]
    mask = mask_of(inner)
    keys = list(model.state_dict())
    with sparseft.compact_gradients(inner, mask):
        assert list(model.state_dict()) == keys
        model.load_state_dict(model.state_dict())
        sparseft.save_delta(inner, mask, tmp_path / "delta.safetensors")
        copied = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="cannot be pickled; save its state_dict"):
            pickle.dumps(model)
        assert any(isinstance(p, SelectedEntries) for p in model.parameters())
    assert [name for name, _ in copied.named_parameters()] == keys
    assert all(type(p) is nn.Parameter and p.requires_grad for p in copied.parameters())
    copied["inner"](inputs()).sum().backward()
    assert all(p.grad is not None for p in copied.parameters())
    assert [name for name, _ in model.named_parameters()] == keys
    pickle.dumps(model)


def test_everything_is_put_back():
    model = net()
    mask = mask_of(model)
    model[3].bias.requires_grad_(False)
    mask = Mask({k: v for k, v in mask.items() if k != "3.bias"}, mask.shapes)
    model(inputs()).sum().backward()
    before = {name: (id(p), type(p), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    attributes = set(model.__dict__)
    with contextlib.suppress(ZeroDivisionError), sparseft.compact_gradients(model, mask):
        leaves = ["3.selected/" + name.replace(".", "/") for name in mask]
        assert [name for name, p in model.named_parameters() if p.requires_grad] == [*mask, *leaves]
        assert all(p.grad is None for p in model.parameters())
        model(inputs()).sum().backward()
        raise ZeroDivisionError
    after = {name: (id(p), type(p), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    assert before == after
    assert set(model.__dict__) == attributes
    assert not model[3]._state_dict_hooks
    assert not model[3]._load_state_dict_pre_hooks


def test_nested():
    model = net()
    mask, other = mask_of(model), mask_of(model, seed=1)
    with sparseft.compact_gradients(model, mask) as outer:
        with outer, sparseft.compact_gradients(model, mask) as inner:
            assert inner.entries == outer.entries
        model(inputs()).sum().backward()
        assert all(leaf.grad is not None for leaf in outer.entries.values())
        with pytest.raises(RuntimeError, match="another mask are active"):
            sparseft.compact_gradients(model, other).__enter__()
        with pytest.raises(ValueError, match="are of another mask"):
            other.param_groups(model)
        with pytest.raises(RuntimeError, match="active in another model"):
            sparseft.compact_gradients(nn.Sequential(model), wrapped(mask)).__enter__()
    assert all(type(p) is nn.Parameter for p in model.parameters())


def wrapped(mask):
    return Mask({f"0.{k}": v for k, v in mask.items()}, {f"0.{k}": v for k, v in mask.shapes.items()})


def test_generate_between_steps():
    model = models.make("gpt2")
    mask = mask_of(model)
    batch = models.batch("gpt2")
    with sparseft.compact_gradients(model, mask):
        optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=0.1)
        for _ in range(2):
            model.train()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            inside = model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False), inside)


def test_a_copied_optimizer_is_not_tied_to_the_model():
    model = net()
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask):
        optimizer = torch.optim.AdamW(mask.param_groups(model), lr=0.1)
        model(inputs()).sum().backward()
        optimizer.step()
        before = copy.deepcopy(model.state_dict())
        copied = copy.deepcopy(optimizer)
        for group in copied.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        copied.step()
        assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_access_is_to_the_parameter_itself():
    model = net()
    weight, mask = model[0].weight, mask_of(model)
    with sparseft.compact_gradients(model, mask):
        assert isinstance(weight, compact_parameter.CompactParameter)
        assert isinstance(weight, nn.Parameter)
        assert weight.shape == (24, 12)
        assert weight.grad is None
        assert weight.is_leaf
        assert weight.detach().data_ptr() == weight.data_ptr()
        assert not weight.detach().requires_grad
        assert (weight * 1).requires_grad
        assert "Parameter" in repr(weight)
        with torch.no_grad():
            weight.mul_(2)
            assert not (weight * 1).requires_grad
