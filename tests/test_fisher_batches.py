"""Batches whose samples are not in the first dimension: named, found by shape, or refused."""

from collections import namedtuple

import pytest
import torch
from exactness import BOUND, assert_same
from models import one_thread  # noqa: F401
from torch import nn

from sparseft.fisher import batch_one_fisher, estimate_fisher, verify
from sparseft.fisher.batches import size, take
from sparseft.fisher.sample_dim import SampleDim

SAMPLES, STEPS, WIDTH, CLASSES = 5, 7, 4, 3


class TimeMajor(nn.Module):
    """[T, N, E] -> [N, C], or [T, N, C] by step."""

    def __init__(self, by_step=False):
        super().__init__()
        self.recurrent, self.head, self.by_step = nn.RNN(WIDTH, 6), nn.Linear(6, CLASSES), by_step

    def forward(self, x, mask=None):
        states, last = self.recurrent(x)
        if mask is not None:
            states = states * mask.T[:, :, None]
        return self.head(states if self.by_step else last[0])


def sequences(by_step=False, steps=STEPS):
    torch.manual_seed(0)
    labels = torch.randint(0, CLASSES, (steps, SAMPLES) if by_step else (SAMPLES,))
    return torch.randn(steps, SAMPLES, WIDTH), labels


def batch_first_scores(model, x, labels):
    """The scores of the same model behind a transposition, from data with samples first."""

    class BatchFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            y = self.inner(x.transpose(0, 1))
            return y.transpose(0, 1) if model.by_step else y

    data = [(x.transpose(0, 1), labels.T if model.by_step else labels)]
    return {name.removeprefix("inner."): score for name, score in batch_one_fisher(BatchFirst(), data).items()}


@pytest.mark.parametrize("named", [None, 1, {"0": 1}])
@pytest.mark.parametrize("samples", [5, 3])
def test_time_major_inputs(named, samples):
    model, (x, labels) = TimeMajor(), sequences()
    expected = batch_first_scores(model, x[:, :samples], labels[:samples])
    scores = estimate_fisher(model, [(x, labels)], samples=samples, batch_dim=named, progress=False)
    assert scores.report.samples == samples
    assert_same(scores, expected)
    assert_same(batch_one_fisher(model, [(x, labels)], samples=samples, batch_dim=named), expected)
    assert max(verify(model, [(x, labels)], batch_dim=named).values()) <= BOUND


@pytest.mark.parametrize("steps", [STEPS, SAMPLES])
def test_time_major_inputs_and_labels(steps):
    model, (x, labels) = TimeMajor(by_step=True), sequences(by_step=True, steps=steps)
    halves = [(x[:, :2], labels[:, :2]), (x[:, 2:], labels[:, 2:])]
    assert_same(estimate_fisher(model, halves, batch_dim=1, progress=False), batch_first_scores(model, x, labels))


def test_named_inputs_of_several_layouts():
    model, (x, labels) = TimeMajor(), sequences()
    batch = {"x": x, "mask": torch.ones(SAMPLES, STEPS), "labels": labels}
    expected = batch_first_scores(model, x, labels)
    assert_same(estimate_fisher(model, [batch], batch_dim={"x": 1}, progress=False), expected)
    # steps or samples: both sizes are in every tensor but the labels, and twice nowhere
    assert_same(estimate_fisher(model, [batch], progress=False), expected)


def test_a_loss_of_ones_own_sees_the_batch_as_it_was():
    model, (x, labels) = TimeMajor(), sequences()
    seen = []

    def loss(model, batch):
        seen.append(batch[0].shape)
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    scores = estimate_fisher(model, [(x, labels)], loss=loss, batch_dim=1, progress=False)
    assert {shape[0] for shape in seen} == {STEPS}
    assert_same(scores, batch_first_scores(model, x, labels))


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(4, 5), torch.zeros(5, 4, 2)),  # both sizes are in both
        (torch.zeros(4, 5), torch.zeros(3)),  # none is
        (torch.zeros(5, 5), torch.zeros(4, 5)),  # one tensor has it twice
    ],
)
def test_shapes_that_leave_doubt_are_refused(batch):
    with pytest.raises(ValueError, match="batch_dim"):
        estimate_fisher(TimeMajor(), [batch], progress=False)


def test_a_named_dimension_must_be_there():
    with pytest.raises(ValueError, match=r"'1': \[5\]"):
        estimate_fisher(TimeMajor(), [sequences()], batch_dim={"1": 1}, progress=False)


def test_batches_are_turned_and_turned_back():
    Pair = namedtuple("Pair", "x mask")
    batch = {
        "nest": Pair(torch.randn(3, 5, 2), torch.randn(5, 3)),
        "labels": torch.randn(5),
        "scale": 2.0,
        "none": None,
    }
    turned = SampleDim({"nest.0": 1})
    first = turned.first(batch)
    assert size(first) == 5
    assert first["nest"].x.shape == (5, 3, 2)
    back = turned.back(take(first, [4, 0]))
    assert isinstance(back["nest"], Pair)
    assert torch.equal(back["nest"].x, batch["nest"].x[:, [4, 0]])
    assert torch.equal(back["nest"].mask, batch["nest"].mask[[4, 0]])
    assert (back["scale"], back["none"]) == (2.0, None)
