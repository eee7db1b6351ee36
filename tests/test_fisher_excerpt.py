"""What the probe looks at: a few tokens where they show as much as all of them."""

import models
import pytest
import torch
from exactness import assert_same
from models import one_thread  # noqa: F401

from sparseft.fisher import batch_one_fisher, estimate_fisher
from sparseft.fisher.excerpt import excerpt


def lengths_seen(model, data):
    """Return the lengths of the sequences the model runs on, and the scores."""
    lengths = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        return lengths, estimate_fisher(model, data, progress=False)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama tied", "bert tokens"])
@pytest.mark.parametrize("left", [False, True])
def test_the_probe_runs_on_few_tokens_and_the_pass_on_all(name, left):
    model, batch = models.make(name), models.batch(name, samples=4, length=48, left=left)
    real = batch["attention_mask"]
    # both ends are padded somewhere, the middle is not
    real[:, 20:40] = 1
    lengths, scores = lengths_seen(model, [batch])
    assert sorted(set(lengths)) == [4, 48]
    assert lengths.count(48) == 1
    assert not scores.report.fallback
    assert_same(scores, batch_one_fisher(model, [batch]))


def test_what_an_excerpt_cannot_show_is_looked_at_whole():
    model, batch = models.make("gpt2"), models.batch("gpt2", samples=3, length=40)
    # each sample is labelled somewhere else
    batch["attention_mask"][:] = 1
    batch["labels"][:] = -100
    for n in range(3):
        batch["labels"][n, 12 * n : 12 * n + 4] = 5
    assert excerpt(batch) is None
    lengths, scores = lengths_seen(model, [batch])
    assert set(lengths) == {40}
    assert not scores.report.fallback


def test_samples_that_begin_alike_are_shown_where_they_differ():
    ids = torch.ones(3, 40, dtype=torch.long)
    ids[2, 20:] = torch.arange(20)
    cut = excerpt({"input_ids": ids, "labels": torch.zeros(3)})
    assert cut is not None
    torch.testing.assert_close(cut["input_ids"], ids[:, 20:24])
    assert excerpt({"input_ids": ids[:2], "labels": torch.zeros(2)}) is None
    assert excerpt({"input_ids": ids[:1], "labels": torch.zeros(1)}) is not None


def test_only_what_is_known_to_run_along_tokens_is_cut():
    ids = torch.arange(80).view(2, 40)
    cut = excerpt({"input_ids": ids, "labels": torch.tensor([0, 1]), "weights": torch.ones(2, 3)})
    assert cut is not None
    assert [list(value.shape) for value in cut.values()] == [[2, 4], [2], [2, 3]]
    assert excerpt({"input_ids": ids, "bias": torch.zeros(2, 40, 40)}) is None
    assert excerpt({"input_ids": ids, "scores": torch.zeros(2, 40)}) is None
    assert excerpt({"input_ids": ids[:, :7]}) is None
    assert excerpt({"input_ids": ids, "attention_mask": torch.arange(40).expand(2, -1) % 3}) is None
    assert excerpt((ids, torch.tensor([0, 1]))) is None
