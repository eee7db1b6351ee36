"""Compact gradients are the dense ones at the selected entries, whatever operation uses a parameter."""

import copy

import models
import pytest
import torch
import torch.nn.functional as F
from compacts import assert_same_gradients, inputs, mask_of, net
from models import one_thread  # noqa: F401
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparseft
from sparseft import testing
from sparseft.mask import Mask


def random_mask(model, density=0.1, seed=0):
    return sparseft.select("random", model, density=density, seed=seed)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("name", models.MODELS)
def test_every_parameter_of_real_architectures(name, device):
    model = models.make(name, device).eval()
    batch = {key: value.to(device) for key, value in models.batch(name).items()}
    tolerance = 1e-5 if device == "cpu" else 1e-4
    assert_same_gradients(model, random_mask(model), lambda model: model(**batch).loss, tolerance)


class Everything(nn.Module):
    """One of each kind of operation on parameters."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16, padding_idx=3)
        self.position = nn.Parameter(torch.randn(1, 7, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.group_norm = nn.GroupNorm(4, 16)
        self.bilinear = nn.Bilinear(16, 16, 8)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.stacked = nn.Parameter(torch.randn(3, 16, 16) / 4)
        self.no_bias = nn.Linear(16, 16, bias=False)
        self.tied = nn.Linear(16, 20, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids) + self.position
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        h = h + self.group_norm(self.conv(h.transpose(1, 2))).transpose(1, 2)
        h = h + torch.einsum("ntd,edf->ntf", h, self.stacked) * self.scale
        weight = self.no_bias.weight
        h = h + h @ weight + h @ weight.T + F.linear(h, weight[:, :]) + self.no_bias(h[:, 0])[:, None]
        other = torch.cat([h[..., :8], self.position[..., 8:].expand(len(h), -1, -1)], dim=-1)
        h = h + F.pad(self.bilinear(h, other), (0, 8)) + weight.mT.sum()
        return self.tied(h).square().mean()


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_every_kind_of_operation(density):
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (4, 7))
    model = Everything()
    assert_same_gradients(model, random_mask(model, density), lambda model: model(ids))


def entries(model, **indices):
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return Mask({name.replace("__", "."): torch.tensor(at, dtype=torch.int32) for name, at in indices.items()}, shapes)


def test_few_columns_are_all_that_is_kept_of_an_input():
    torch.manual_seed(0)
    model = nn.Linear(64, 8)
    x = torch.randn(5, 3, 64)
    mask = entries(model, weight=[2, 66, 130, 133, 511])
    assert_same_gradients(model, mask, lambda model: model(x).square().sum())
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with sparseft.compact_gradients(model, mask), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).sum()
    assert (5, 3, 3) in [tuple(tensor.shape) for tensor in kept]
    assert x.shape not in [tensor.shape for tensor in kept]


def test_few_rows_of_a_transformers_conv1d():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = Conv1D(12, 40)
    x = torch.randn(5, 3, 40)
    mask = entries(model, weight=[2, 7, 24 * 12, 24 * 12 + 5], bias=[0, 11])
    assert_same_gradients(model, mask, lambda model: model(x).square().sum())


def test_a_layer_with_nothing_selected_keeps_no_input():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(1000, 8)
    with sparseft.compact_gradients(model, entries(model, **{"0__weight": [5]})):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x).sum()
    assert max(tensor.numel() for tensor in kept) == 1000  # the one column of the first layer's input


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 6)).to(dtype)
    x = torch.randn(33, 24, dtype=dtype)
    assert_same_gradients(model, random_mask(model, 0.2), lambda model: model(x).float().square().mean(), 0.02)


@pytest.mark.parametrize("density", [0.01, 0.3])
def test_autocast(density):
    torch.manual_seed(0)
    model = models.make("bert").eval()
    batch = models.batch("bert")

    def loss(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch).loss

    assert_same_gradients(model, random_mask(model, density), loss, 0.05)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    model = nn.Sequential(nn.Linear(8, 8), inner)
    x = torch.randn(6, 8)

    def loss(model):
        return checkpoint(model[1], model[0](x), use_reentrant=reentrant).square().sum()

    assert_same_gradients(model, random_mask(model, 0.3), loss)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_gradient_checkpointing_of_transformers(name):
    model = models.make(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = models.batch(name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same_gradients(model, random_mask(model), lambda model: model(**batch).loss)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_compiled_model(name):
    model = models.make(name).eval()
    batch = models.batch(name)
    mask = random_mask(model)
    reference = copy.deepcopy(model)
    reference(**batch).loss.backward()
    with sparseft.compact_gradients(model, mask) as compact:
        torch._dynamo.reset()
        torch.compile(model, fullgraph=True, backend="aot_eager")(**batch).loss.backward()
        for key, leaf in compact.entries.items():
            grad = dict(reference.named_parameters())[key].grad
            want = torch.zeros(leaf.shape) if grad is None else grad.view(-1)[mask[key].long()]
            got = torch.zeros(leaf.shape) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_second_derivatives_are_refused():
    model = nn.Linear(4, 3)
    with sparseft.compact_gradients(model, entries(model, weight=[1, 5])) as compact:
        x = torch.randn(2, 4, requires_grad=True)
        (grad,) = torch.autograd.grad(model(x).square().sum(), [compact.entries["weight"]], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_forward_results_are_the_same():
    torch.manual_seed(0)
    model, batch = models.make("bert").eval(), models.batch("bert")
    want = model(**batch).logits
    with sparseft.compact_gradients(model, random_mask(model)):
        got = model(**batch).logits
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, want)
    torch.testing.assert_close(got, want)


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
