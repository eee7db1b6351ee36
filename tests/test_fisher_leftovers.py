"""What no rule captures: recurrent layers, composed weights, raw tensors in einsum; exact, one sample at a time."""

import pytest
import torch
import torch.nn.functional as F
from models import one_thread  # noqa: F401
from nets import C, H, Net, data, parameter
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from sparseft.fisher import batch_one_fisher, estimate_fisher


class Recurrent(Net):
    def odd(self, x):
        return self.inner(x)[0]


class Cell(Net):
    def odd(self, x):
        state, states = x.new_zeros(len(x), H), []
        for token in x.unbind(1):
            state = self.inner(token, state)
            states.append(state)
        return torch.stack(states, 1)


class Composed(Net):
    def odd(self, x):
        return self.inner(x)


class Heads(Net):
    def odd(self, x):
        return torch.einsum("ntd,hde->nthe", x, self.inner).flatten(2).tanh()


class Tied(Net):
    # one raw tensor, contracted and composed with: its gradients are added before they are squared
    def odd(self, x):
        y = torch.einsum("ntd,de->nte", x, self.inner).tanh()
        return F.linear(y, self.inner @ self.inner + self.inner)


class Plus(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.up, self.down = parameter(H, rank), parameter(rank, H)

    def forward(self, weight):
        return weight + self.up @ self.down


def low_rank():
    layer = nn.TransformerEncoderLayer(H, 2, H, batch_first=True)
    parametrize.register_parametrization(layer.linear1, "weight", Plus(2))
    return layer


MODELS = {
    "LSTM": (Recurrent, lambda: nn.LSTM(H, H, batch_first=True), "inner.weight_hh_l0"),
    "GRU, both ways": (
        Recurrent,
        lambda: nn.GRU(H, H // 2, batch_first=True, bidirectional=True),
        "inner.bias_ih_l0_reverse",
    ),
    "GRU cell": (Cell, lambda: nn.GRUCell(H, H), "inner.weight_ih"),
    "weight norm": (Composed, lambda: parametrizations.weight_norm(nn.Linear(H, H)), None),
    "composed in a transformer": (Composed, low_rank, "inner.linear1.parametrizations.weight.0.up"),
    "einsum": (Heads, lambda: parameter(2, H, H // 2), "inner"),
    "tied": (Tied, lambda: parameter(H, H), "inner"),
}


def made(name):
    torch.manual_seed(0)
    kind, inner, left = MODELS[name]
    return kind(inner=inner()), left or "inner.parametrizations.weight.original0"


def batches():
    ids, labels = data()
    return [(ids[:3], labels[:3]), (ids[3:], labels[3:])]


def assert_same(scores, expected):
    assert scores.keys() == expected.keys()
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        # a key's bias has a gradient that is zero but for rounding
        error = float((scores[name] - value).abs().max()) / max(float(value.max()), 1e-9 * largest)
        assert error <= 1e-5, f"{name}: error {error:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_leftovers_are_exact_and_reported(name):
    model, left = made(name)
    found = estimate_fisher(model, batches(), progress=False)
    assert found.report.rules[left] == "fallback"
    assert f"one sample at a time: {left} (" in str(found.report)
    # nothing of sparseft
    ids, labels = data()
    expected = {key: torch.zeros_like(value) for key, value in model.named_parameters()}
    for sample, label in zip(ids.split(1), labels.split(1), strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model.eval()(sample), label), list(model.parameters()))
        for total, grad in zip(expected.values(), grads, strict=True):
            total += grad**2 / len(ids)
    assert_same(found, expected)


@pytest.mark.parametrize("mode", ["expected", "sampled"])
@pytest.mark.parametrize("name", ["LSTM", "composed in a transformer", "tied"])
def test_leftovers_in_other_modes(name, mode):
    model, _ = made(name)
    found = estimate_fisher(model, batches(), mode=mode, progress=False)
    assert_same(found, batch_one_fisher(model, batches(), mode=mode))


@pytest.mark.parametrize("name", ["GRU cell", "einsum"])
def test_leftovers_token_by_token(name):
    model, _ = made(name)

    def losses(model, batch):
        logits = model.out(model.odd(model.embed(batch[0])))
        return F.cross_entropy(logits.flatten(0, 1), batch[0].flatten() % C, reduction="none").view(batch[0].shape)

    options = {"loss": losses, "token_reduction": "token"}
    found = estimate_fisher(model, batches(), progress=False, **options)
    assert_same(found, batch_one_fisher(model, batches(), **options))
