"""Compact gradients and the world around them: optimizers, clipping, scaling, files, copies; and bad input."""

import contextlib
import copy
import pickle

import models
import pytest
import torch
from models import one_thread  # noqa: F401
from torch import nn

import sparseft
from sparseft.compact import linear as compact_linear
from sparseft.compact import parameter as compact_parameter
from sparseft.entries import SelectedEntries
from sparseft.mask import Mask


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 4)).to(dtype)


def mask_of(model, density=0.2, seed=0, **options):
    return sparseft.select("random", model, density=density, seed=seed, **options)


def inputs(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(10, 12, generator=generator).to(dtype)


OPTIMIZERS = {
    "SparseAdamW": lambda groups: sparseft.SparseAdamW(groups, lr=1e-2, weight_decay=0.1),
    "SparseSGD": lambda groups: sparseft.SparseSGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
    "SparseLion": lambda groups: sparseft.SparseLion(groups, lr=1e-3, weight_decay=0.1),
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW, foreach": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, foreach=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
}


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request):
    return OPTIMIZERS[request.param]


@pytest.fixture
def reference_arithmetic(monkeypatch):
    """Products as torch's own linear layers make them: a dense one, of which the selected entries are taken."""

    def selected_grad_(grad, x, dy, indices, plan=None):
        grad += (dy.T @ x).reshape(-1)[indices.long()]

    monkeypatch.setattr(compact_linear.torch.ops.sparseft, "selected_grad_", selected_grad_)
    monkeypatch.setattr("sparseft.products.prefer_onednn", lambda: False)


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


def test_weights_changed_from_outside_win(make_optimizer, tmp_path):
    model = net()
    mask = mask_of(model)
    sparseft.save_delta(model, mask, tmp_path / "base.safetensors")
    saved = copy.deepcopy(model.state_dict())
    with sparseft.compact_gradients(model, mask) as compact:
        optimizer = make_optimizer(mask.param_groups(model))
        for _ in range(2):
            model(inputs()).square().mean().backward()
            optimizer.step()
        model.load_state_dict(saved)
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        model(inputs()).square().mean().backward()
        optimizer.step()
        for name, leaf in compact.entries.items():
            torch.testing.assert_close(leaf.detach(), saved[name].reshape(-1)[mask[name].long()], rtol=1e-6, atol=1e-7)


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


def test_an_optimizer_goes_on_when_the_context_is_entered_again(make_optimizer):
    def train(model, compact, mask, optimizer, steps):
        for step in steps:
            model(inputs(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    once, twice = net(), net()
    mask = mask_of(once)
    with sparseft.compact_gradients(once, mask) as compact:
        train(once, compact, mask, make_optimizer(mask.param_groups(once)), range(6))
    compact = sparseft.compact_gradients(twice, mask)
    with compact:
        optimizer = make_optimizer(mask.param_groups(twice))
        train(twice, compact, mask, optimizer, range(3))
    twice(inputs()).sum().backward()
    twice.zero_grad()
    with compact:
        train(twice, compact, mask, optimizer, range(3, 6))
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(a, b)


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


# what must be refused at the next step, and the part of the error that tells it
CHANGES = {
    "replaced": "0.weight was replaced while",
    "resized": "moved, resized or converted",
    "converted": "moved, resized or converted",
}


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
    with pytest.raises(ValueError, match="selects no entries"):
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


class Product(torch.autograd.Function):
    """Somebody's own operation, which no `__torch_function__` is asked about."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


def own_function(model, x):
    return Product.apply(x, model[0].weight).square().mean()


def own_function_and_layer(model, x):
    return (Product.apply(x, model[0].weight) + model[0](x)).square().mean()


def nested_tensor(model, x):
    nested = torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged)
    return sum(part.square().sum() for part in model[0](nested).unbind())


def in_place(model, x):
    h = model[0](x)
    h += model[0].bias
    h *= model[2].weight
    return h.square().mean()


@pytest.mark.parametrize("loss", [own_function, own_function_and_layer, nested_tensor, in_place])
def test_operations_that_bypass_the_rules(loss):
    model = net()
    mask, other = mask_of(model, 0.5), copy.deepcopy(model)
    loss(other, inputs()).backward()
    with sparseft.compact_gradients(model, mask) as compact:
        loss(model, inputs()).backward()
        for name, leaf in compact.entries.items():
            dense = other.get_parameter(name).grad
            want = torch.zeros(leaf.shape) if dense is None else dense.reshape(-1)[mask[name].long()]
            torch.testing.assert_close(torch.zeros(leaf.shape) if leaf.grad is None else leaf.grad, want)
            assert model.get_parameter(name).grad is None


def minimised(model, groups):
    optimizer = torch.optim.LBFGS([p for group in groups for p in group["params"]], max_iter=20)
    x = inputs()
    target = x[:, :4].sin()

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(closure())


def test_an_optimizer_that_looks_again_in_the_middle_of_a_step():
    """L-BFGS evaluates its closure after each change of the leaves: the weights must have it by then."""
    model = net()
    every = Mask({name: torch.arange(p.numel()) for name, p in model.named_parameters()}, shapes_of(model))
    plain = copy.deepcopy(model)
    want = minimised(plain, [{"params": list(plain.parameters())}])
    with sparseft.compact_gradients(model, every):
        got = minimised(model, every.param_groups(model))
    assert got < 0.3
    assert abs(got - want) < 0.02


def shapes_of(model):
    return {name: p.shape for name, p in model.named_parameters()}


def test_leaves_changed_by_hand_are_in_the_weights():
    model = net()
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask) as compact:
        with torch.no_grad():
            for leaf in compact.entries.values():
                leaf.add_(1)
        wanted = {name: leaf.detach().clone() for name, leaf in compact.entries.items()}
    for name, want in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).detach().view(-1)[mask[name].long()], want)


def test_a_new_context_of_the_same_mask_has_the_same_leaves(make_optimizer):
    model = net()
    mask, optimizer, before = mask_of(model), None, copy.deepcopy(model.state_dict())
    for _ in range(2):
        with sparseft.compact_gradients(model, mask):
            optimizer = optimizer or make_optimizer(mask.param_groups(model))
            model(inputs()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            after = copy.deepcopy(model.state_dict())
        assert not torch.equal(before["0.weight"], after["0.weight"])
        before = after


def test_leaves_whose_context_was_left_are_refused(make_optimizer):
    model = net()
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask):
        optimizer = make_optimizer(mask.param_groups(model))
        model(inputs()).sum().backward()
    with pytest.raises(RuntimeError, match="compact_gradients was left, or is of another mask"):
        optimizer.step()


def test_an_average_made_inside_follows_the_weights():
    model = net()
    mask = mask_of(model)
    with sparseft.compact_gradients(model, mask):
        average = torch.optim.swa_utils.AveragedModel(model)
        average.update_parameters(model)
        for mean, weight in zip(average.module.parameters(), model.parameters(), strict=False):
            assert mean.shape == weight.shape
            assert torch.equal(mean, weight)


def test_a_low_precision_run_goes_on_where_it_was_saved(tmp_path):
    """The leaves' digits beyond the weights' are in the optimizer's state."""

    def steps(model, optimizer, which):
        for step in which:
            model(inputs(step, torch.bfloat16)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, resumed = net(torch.bfloat16), net(torch.bfloat16)
    mask = mask_of(whole)
    with sparseft.compact_gradients(whole, mask):
        optimizer = sparseft.SparseAdamW(mask.param_groups(whole), lr=1e-4)
        steps(whole, optimizer, range(5))
        torch.save([whole.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
        steps(whole, optimizer, range(5, 10))
    weights, state = torch.load(tmp_path / "saved.pt")
    with sparseft.compact_gradients(resumed, mask) as compact:
        optimizer = sparseft.SparseAdamW(mask.param_groups(resumed), lr=1e-4)
        resumed.load_state_dict(weights)
        optimizer.load_state_dict(state)
        assert any(not torch.equal(leaf, leaf.to(torch.bfloat16).float()) for leaf in compact.entries.values())
        steps(resumed, optimizer, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


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
