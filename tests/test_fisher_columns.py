"""Per-sample gradients at chosen entries: against single backward passes, and against the Fisher they make up."""

import models
import pytest
import torch
from exactness import assert_same, assert_same_gradients
from models import one_thread  # noqa: F401
from torch import nn

from sparseft import estimate_fisher, testing
from sparseft.fisher import sample_gradients


def chosen(model, share=0.3, seed=0):
    """Pick entries at random in every parameter; none in some."""
    generator = torch.Generator().manual_seed(seed)
    counts = {name: int(share * p.numel()) for name, p in model.named_parameters()}
    return {name: testing.random_indices(p.numel(), counts[name], generator) for name, p in model.named_parameters()}


def single_gradients(model, data, indices, losses):
    """Return name -> [N, k] by one ordinary backward pass a sample."""
    model.eval()
    rows = {name: [] for name, index in indices.items() if index.numel()}
    for loss in losses(model, data):
        grads = torch.autograd.grad(loss, [dict(model.named_parameters())[name] for name in rows], allow_unused=True)
        for name, grad in zip(rows, grads, strict=True):
            index = indices[name].long()
            rows[name].append(torch.zeros(len(index)) if grad is None else grad.to_dense().flatten()[index])
    return {name: torch.stack(parts) for name, parts in rows.items()}


def own_losses(model, batch):
    """Yield what the model itself returns for batches of one."""
    for sample in range(len(batch["labels"])):
        yield model(**{key: value[sample : sample + 1] for key, value in batch.items()}).loss


@pytest.mark.parametrize("name", ["bert", "bert masked", "roberta", "gpt2", "llama", "llama tied"])
def test_they_are_the_gradients_of_single_samples(name):
    model, batch = models.make(name), models.batch(name)
    indices = chosen(model)
    found = sample_gradients(model, [batch], indices, progress=False)
    assert_same_gradients(found, single_gradients(model, batch, indices, own_losses))
    assert found.report.positions == list(range(5))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in models.MODELS),
        ("bert", {"mode": "expected"}),
        ("gpt2", {"mode": "sampled"}),
        ("gpt2", {"token_reduction": "token"}),
        ("llama tied", {"token_reduction": "sum"}),
        ("llama tied", {"mode": "sampled"}),
    ],
    ids=str,
)
def test_the_mean_of_their_squares_is_the_fisher(name, options):
    model, batch = models.make(name), models.batch(name, samples=7)
    slices = [{key: value[i : i + 3] for key, value in batch.items()} for i in range(0, 7, 3)]
    indices = chosen(model)
    scores = estimate_fisher(model, slices, progress=False, **options)
    found = sample_gradients(model, slices, indices, squared=True, progress=False, **options)
    largest = max(float(score.max()) for score in scores.values())
    for key, rows in found.items():
        expected = scores[key].flatten()[indices[key].long()]
        torch.testing.assert_close(rows.mean(0), expected, rtol=1e-5, atol=1e-9 * largest)
    assert found.columns.shape == (7, sum(index.numel() for index in indices.values()))
    assert set(found.report.rules.values()) <= set(scores.report.rules.values())


class Odd(nn.Module):
    """A convolution, a matrix used twice, and a parameter that no rule captures."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, groups=2, padding=1)
        self.twice = nn.Linear(8, 8)
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.conv(x).mT
        h = self.twice(torch.tanh(self.twice(h)))
        h = torch.linalg.solve(torch.eye(8) + 0.1 * self.mix, h.mT).mT
        return self.head(h.mean(1))


def test_convolutions_matrices_used_twice_and_the_fallback():
    torch.manual_seed(0)
    model, x, y = Odd(), torch.randn(4, 6, 5), torch.tensor([0, 2, 1, 1])
    indices = chosen(model, 0.5)

    def losses(model, data):
        for sample in range(4):
            yield nn.functional.cross_entropy(model(x[sample : sample + 1]), y[sample : sample + 1])

    found = sample_gradients(model, [(x, y)], indices, progress=False)
    assert_same_gradients(found, single_gradients(model, None, indices, losses))
    assert found.report.rules["mix"] == "fallback"


def test_one_entry_and_every_entry_of_a_parameter():
    model, batch = models.make("bert"), models.batch("bert")
    every = {name: torch.arange(p.numel(), dtype=torch.int32) for name, p in model.named_parameters()}
    one = {"bert.embeddings.word_embeddings.weight": torch.tensor([5 * 32 + 7])}
    whole = sample_gradients(model, [batch], every, progress=False)
    assert_same_gradients(whole, single_gradients(model, batch, every, own_losses))
    assert_same_gradients(
        sample_gradients(model, [batch], one, progress=False), single_gradients(model, batch, one, own_losses)
    )


def test_samples_that_are_not_finite_are_left_out():
    model, batch = models.make("bert regression"), models.batch("bert regression", samples=6)
    indices = chosen(model)
    batch["labels"][2] = float("nan")  # the loss
    batch["labels"][4] = 3e38  # the gradient, once it is squared
    slices = [{key: value[i : i + 4] for key, value in batch.items()} for i in range(0, 6, 4)]
    found = sample_gradients(model, slices, indices, squared=True, progress=False)
    assert found.report.positions == [0, 1, 3, 5]
    assert found.report.dropped == [2, 4]
    rest = {key: value[[0, 1, 3, 5]] for key, value in batch.items()}
    expected = single_gradients(model, rest, indices, own_losses)
    assert_same(found, {name: rows.square() for name, rows in expected.items()})
    with pytest.raises(ValueError, match="at least one sample must have a finite"):
        sample_gradients(model, [{key: value[2:3] for key, value in batch.items()}], indices, progress=False)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_fp32_columns(dtype, device):
    model, batch = models.make("bert", device, dtype), models.batch("bert")
    indices = chosen(model)
    found = sample_gradients(model, [batch], indices, progress=False)
    scores = estimate_fisher(model, [batch], progress=False)
    assert found.columns.dtype == torch.float32
    for key, rows in found.items():
        expected = scores[key].flatten()[indices[key].long().to(device)]
        torch.testing.assert_close(rows.square().mean(0), expected, rtol=1e-4, atol=1e-6 * float(scores[key].max()))


def test_bad_arguments_are_named_and_the_model_is_left_alone():
    model, batch = models.make("bert"), models.batch("bert")
    name = "classifier.weight"
    index = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="squared=True"):
        sample_gradients(model, [batch], {name: index}, mode="expected")
    with pytest.raises(ValueError, match="at least one entry"):
        sample_gradients(model, [batch], {name: index[:0]})
    with pytest.raises(ValueError, match="sorted and unique"):
        sample_gradients(model, [batch], {name: index.flip(0)})
    with pytest.raises(ValueError, match=r"in \[0, 96\)"):
        sample_gradients(model, [batch], {name: torch.tensor([96])})
    with pytest.raises(TypeError, match="int32 or int64"):
        sample_gradients(model, [batch], {name: torch.tensor([0.0])})
    with pytest.raises(ValueError, match="parameters of the model"):
        sample_gradients(model, [batch], {"other": index})
    with pytest.raises(ValueError, match="samples must be at least 1"):
        sample_gradients(model, [batch], {name: index}, samples=0)
    tied = models.make("llama tied")
    with pytest.raises(ValueError, match="first name"):
        sample_gradients(tied, [models.batch("llama tied")], {"lm_head.weight": index})
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
