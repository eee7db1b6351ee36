"""Squared norms of whole per-sample gradients, from the Fisher pass: against single backward passes."""

import pytest
import test_fisher_experts as experts
import test_fisher_layers as layers
import torch
from models import batch, full_precision, make, one_thread  # noqa: F401
from test_fisher_columns import Odd
from torch import nn

from sparseft import testing
from sparseft.fisher import batch_one_fisher
from sparseft.fisher.batches import limited, take
from sparseft.fisher.loss import Objective
from sparseft.fisher.patches import add_by_sample_, add_unfolded_
from sparseft.selection.ird.passes import fisher_of
from sparseft.selection.ird.pool import Pool


def images(samples=5):
    x, targets = layers.data(layers.C, 7, 6)
    return x[:samples], targets[:samples]


# what it is -> how to make the model, and a batch of five samples for it
CASES = {
    "padding": lambda device: (make("bert", device), batch("bert")),
    "a tied head": lambda device: (make("llama tied", device), batch("llama tied")),
    "a tied head and shared positions": lambda device: (make("t5", device), batch("t5")),
    "layers used twice": lambda device: (make("albert", device), batch("albert")),
    "a table on its way through projections": lambda device: (make("deberta", device), batch("deberta")),
    "patches": lambda device: (make("vit", device), batch("vit")),
    "convolutions used twice": lambda device: (layers.shaken(layers.USES["used twice"][0]()).to(device), images()),
    "a convolution of two geometries": lambda device: (
        layers.shaken(layers.USES["a shared weight, other groups"][0]()).to(device),
        images(),
    ),
    "a packed projection": lambda device: (_attention().to(device), _sequences()),
    "experts": lambda device: (experts.make(experts.qwen, device), experts.ragged()),
    "experts with biases": lambda device: (experts.make(experts.gpt_oss, device), experts.ragged()),
    "a parameter without a rule": lambda device: (_odd(device), (torch.randn(5, 6, 5), torch.arange(5) % 3)),
}


def _odd(device):
    torch.manual_seed(0)
    model = Odd()
    if device != "cpu":
        pytest.skip("makes a tensor on the CPU")
    return model


class _Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.cross(x[:, :2], x, x, need_weights=False)[0].mean(1))


def _attention():
    torch.manual_seed(0)
    return _Cross()


def _sequences():
    return torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3


def norms_of(model, pool, mode="empirical", reduction="mean"):
    norms = {}
    names = [name for name, _ in model.named_parameters()]
    objective = Objective(mode, None, reduction, 0)
    fisher, used, _ = fisher_of(model, pool, names, objective, progress=False, norms=norms)
    assert sorted(norms) == used
    total = sum(float(scores.sum(dtype=torch.float64)) for scores in fisher.values())
    assert sum(norms.values()) == pytest.approx(total, rel=1e-5)
    return norms


def expected_norms(model, pool, **options):
    found = {}
    for data, positions in pool:
        for row, position in enumerate(positions):
            fisher = batch_one_fisher(model, [take(data, [row])], **options)
            found[position] = sum(float(scores.sum(dtype=torch.float64)) for scores in fisher.values())
    return found


def halves(data):
    """Return five samples as two batches, in positions that do not begin at 0."""
    whole, first = Pool(list(limited([data] * 2, None))), [6, 8]
    return Pool([*whole.only(first), *whole.only([5, 7, 9])])


def assert_norms(case, device):
    model, data = CASES[case](device)
    pool = halves(data)
    assert norms_of(model, pool) == pytest.approx(expected_norms(model, pool), rel=1e-5 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("case", CASES)
def test_norms_are_those_of_single_samples(case, device):
    assert_norms(case, device)


@pytest.mark.parametrize("options", [{"mode": "expected"}, {"token_reduction": "token"}], ids=str)
def test_norms_where_a_batch_takes_several_backward_passes(options):
    name = "llama tied" if "token_reduction" in options else "bert"
    model, pool = make(name), halves(batch(name))
    found = norms_of(model, pool, options.get("mode", "empirical"), options.get("token_reduction", "mean"))
    assert found == pytest.approx(expected_norms(model, pool, **options), rel=1e-5)


@pytest.mark.parametrize("elements", [1, 1 << 25])
@pytest.mark.parametrize("add", [add_by_sample_, add_unfolded_])
@pytest.mark.parametrize("case", ["patches", "convolutions used twice", "a convolution of two geometries"])
def test_both_ways_to_square_a_convolution_give_the_norms(case, add, elements, monkeypatch):
    def added(fisher, uses, scores=None):
        add(fisher, uses, scores, elements=elements)

    monkeypatch.setattr("sparseft.fisher.tally.add_patches_", added)
    assert_norms(case, "cpu")


def test_a_sample_that_is_not_finite_leaves_the_norms_of_others_as_they_are():
    model, data = make("bert regression"), batch("bert regression", samples=10)
    data["labels"][2] = float("nan")  # the loss
    data["labels"][6] = 3e38  # the gradient, once it is squared
    pool = Pool(list(limited([{key: value[i : i + 5] for key, value in data.items()} for i in (0, 5)], None)))
    good = pool.only([p for p in pool.positions if p not in (2, 6)])
    assert norms_of(model, pool) == pytest.approx(expected_norms(model, good), rel=1e-5)


def test_a_sample_without_a_gradient_has_norm_zero():
    model, data = make("gpt2"), batch("gpt2")
    data["labels"][3] = -100
    found = norms_of(model, Pool([(data, list(range(5)))]))
    assert found[3] == 0 < min(norm for position, norm in found.items() if position != 3)
