"""Averages of a model whose gradients are compact, and torch.func over it: as without compact gradients."""

import copy

import pytest
import torch
from compacts import inputs, mask_of, net
from models import one_thread  # noqa: F401
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import sparseft

AVERAGES = {
    "equal": {},
    "moving": {"avg_fn": lambda mean, new, n: 0.9 * mean + 0.1 * new},
    "moving, many": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
}


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Linear(24, 4))


def assert_same_models(one, two):
    assert one.state_dict().keys() == two.state_dict().keys()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name], msg=name)


@pytest.mark.parametrize("how", AVERAGES)
@pytest.mark.parametrize("made", ["before", "inside"])
def test_an_average_is_that_of_the_weights(made, how):
    """Against one that is kept of plain copies; updated after leaving, too."""
    model = normed()
    mask = mask_of(model)
    average = AveragedModel(model, **AVERAGES[how])
    want = AveragedModel(model, **AVERAGES[how])
    with sparseft.compact_gradients(model, mask):
        if made == "inside":
            average = AveragedModel(model, **AVERAGES[how])
        optimizer = torch.optim.SGD(mask.param_groups(model), lr=0.1)
        for step in range(3):
            model(inputs(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            plain = normed()
            plain.load_state_dict(model.state_dict())
            want.update_parameters(plain)
        assert_same_models(average, want)
        update_bn([inputs()], average)
        model.load_state_dict(average.module.state_dict())
    average.update_parameters(model)
    assert_same_models(average.module, model)
    assert all(type(p) is nn.Parameter for p in average.parameters())


def test_an_average_of_buffers_too_is_taken_of_a_copy():
    """It goes through parameters and then buffers, between which the leaves come."""
    model = normed()
    average = AveragedModel(model, use_buffers=True)
    with sparseft.compact_gradients(model, mask_of(model)):
        model(inputs())
        with pytest.raises(RuntimeError, match="size"):
            average.update_parameters(model)
        average.update_parameters(copy.deepcopy(model))
    assert_same_models(average.module, model)


def test_an_average_of_a_compiled_model():
    model = net()
    compiled = torch.compile(model, backend="eager")
    with sparseft.compact_gradients(compiled, mask_of(model)):
        average = AveragedModel(compiled)
        average.update_parameters(compiled)
        with torch.no_grad():
            torch.testing.assert_close(average(inputs()), model(inputs()))


def of_samples(model, x):
    return vmap(model, randomness="error")(x).square().sum()


def of_gradients(model, x):
    """A penalty on the gradients of the inputs: second derivatives."""
    return vmap(grad(lambda sample: model(sample).square().sum()))(x).square().sum()


def of_tangents(model, x):
    return jvp(model, (x,), (x.cos(),))[1].square().sum()


def of_cotangents(model, x):
    y, pull = vjp(model, x)
    return pull(y)[0].square().sum()


def of_a_call(model, x):
    """With the model's own parameters, as whoever collects them once has them."""
    return functional_call(model, dict(model.named_parameters()), (x,)).square().sum()


@pytest.mark.parametrize("loss", [of_samples, of_gradients, of_tangents, of_cotangents, of_a_call])
def test_leaves_get_gradients_through_transforms(loss):
    model = net()
    mask, plain = mask_of(model), copy.deepcopy(model)
    loss(plain, inputs()).backward()
    with sparseft.compact_gradients(model, mask) as compact:
        loss(model, inputs()).backward()
        for name, leaf in compact.entries.items():
            # a bias has no part in some derivatives
            dense = plain.get_parameter(name).grad
            want = torch.zeros(leaf.shape) if dense is None else dense.reshape(-1)[mask[name].long()]
            got = torch.zeros(leaf.shape) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert model.get_parameter(name).grad is None


@pytest.mark.parametrize("loss", [of_samples, of_gradients])
def test_compiled_transforms(loss):
    model = net()
    with sparseft.compact_gradients(model, mask_of(model)) as compact:
        loss(lambda x: model(x), inputs()).backward()
        want = [leaf.grad for leaf in compact.entries.values()]
        model.zero_grad()
        torch._dynamo.reset()
        torch.compile(lambda x: loss(lambda x: model(x), x), fullgraph=True, backend="aot_eager")(inputs()).backward()
        for leaf, each in zip(compact.entries.values(), want, strict=True):
            torch.testing.assert_close(leaf.grad, each)
    torch._dynamo.reset()


@pytest.mark.parametrize("transform", [jacrev, jacfwd, lambda f: hessian(lambda x: f(x).square().sum())])
def test_derivatives_of_inputs(transform):
    model = net()
    want = transform(copy.deepcopy(model))(inputs()[0])
    with sparseft.compact_gradients(model, mask_of(model)):
        torch.testing.assert_close(transform(model)(inputs()[0]).detach(), want.detach())


class Words(nn.Module):
    """A tied head, and an embedding whose rule no transform knows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids).cumsum(0)))


def test_samples_of_words():
    model, ids = Words(), torch.arange(24).view(4, 6) % 11
    mask, plain = mask_of(model), copy.deepcopy(model)
    vmap(plain)(ids).square().mean().backward()
    with sparseft.compact_gradients(model, mask) as compact:
        vmap(model)(ids).square().mean().backward()
        for name, leaf in compact.entries.items():
            want = plain.get_parameter(name).grad.reshape(-1)[mask[name].long()]
            torch.testing.assert_close(leaf.grad, want, rtol=1e-4, atol=1e-5)


def test_parameters_that_are_passed_are_those_that_count():
    """Plain tensors in the place of a model's parameters have dense gradients, of each sample too."""
    model, other = net(), net()
    with torch.no_grad():
        other[0].weight.add_(1)
    values = {name: p.detach() for name, p in other.named_parameters()}

    def loss(model):
        return lambda values, x: functional_call(model, values, (x,)).square().sum()

    want = vmap(grad(loss(other)), in_dims=(None, 0))(values, inputs())
    with sparseft.compact_gradients(model, mask_of(model)) as compact:
        got = vmap(grad(loss(model)), in_dims=(None, 0))(values, inputs())
        for name, each in want.items():
            torch.testing.assert_close(got[name], each)
        assert not functional_call(model, values, (inputs(),)).requires_grad
        assert all(leaf.grad is None for leaf in compact.entries.values())
        assert all(model.get_parameter(name).selected_entries is leaf for name, leaf in compact.entries.items())


def test_an_ensemble_of_models_inside():
    one, two, x = net(), net(), inputs()
    with torch.no_grad():
        two[0].weight.add_(1)
    mask = mask_of(one)
    want = torch.stack([one(x), two(x)])
    with sparseft.compact_gradients(one, mask), sparseft.compact_gradients(two, mask):
        stacked, buffers = stack_module_state([one, two])
        base = copy.deepcopy(one)
        got = vmap(lambda values, buffers: functional_call(base, (values, buffers), (x,)))(stacked, buffers)
    assert stacked["0.weight"].shape == (2, 24, 12)
    torch.testing.assert_close(got, want)
