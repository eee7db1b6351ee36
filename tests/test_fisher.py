"""Whole models: every parameter against single backward passes through the model's own loss."""

import contextlib
import importlib

import models
import pytest
import torch
from exactness import BOUND, assert_same, own_loss_loop, slices
from models import one_thread  # noqa: F401

from sparseft import testing
from sparseft.fisher import batch_one_fisher, estimate_fisher, small_layers, verify


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("name", models.MODELS)
def test_every_parameter_equals_the_loop_of_single_samples(name, device):
    model = models.make(name, device)
    for left in (False, True):
        batch = models.batch(name, left=left)
        scores = estimate_fisher(model, slices(batch, 3), progress=False)
        assert_same(scores, own_loss_loop(model, batch))
        assert scores.report.samples == 5
        assert not scores.report.fallback
        assert set(scores.report.rules) == {name for name, _ in model.named_parameters()}
        assert "fallback" not in scores.report.rules.values()
        assert all(score.dtype == torch.float32 for score in scores.values())


@pytest.mark.parametrize("name", ["deberta", "deberta with projections"])
def test_what_no_gradient_reaches_in_the_probe_falls_back(name):
    # DeBERTa reads the first token; if it is padding, no position reaches it, and nothing shows where samples lie
    model, batch = models.make(name), models.batch(name, length=7, left=True)
    scores = estimate_fisher(model, slices(batch, 3), progress=False)
    assert_same(scores, own_loss_loop(model, batch))
    fell = {key for key, rule in scores.report.rules.items() if rule in ("fallback", "unused")}
    assert fell == set(scores.report.fallback)
    assert fell


@pytest.mark.parametrize("name", ["bert", "bert masked", "gpt2", "llama classification"])
def test_batch_size_order_and_padding_do_not_matter(name):
    model, batch = models.make(name), models.batch(name)
    whole = estimate_fisher(model, [batch], progress=False)
    for size in (1, 2):
        assert_same(estimate_fisher(model, slices(batch, size), progress=False), whole)
    turned = {key: value.flip(0) for key, value in batch.items()}
    assert_same(estimate_fisher(model, [turned], progress=False), whole)
    longer = {}
    for key, value in batch.items():
        pads = torch.full((len(value), 4), -100 if key == "labels" else 0)
        longer[key] = torch.cat([value, pads], 1) if value.dim() == 2 else value
    assert_same(estimate_fisher(model, [longer], progress=False), whole)


@pytest.mark.parametrize("name", ["t5", "t5 eager", "deberta", "bert"])
def test_batches_with_and_without_padding_may_alternate(name):
    # without padding some masks are not made, and other operations run
    model, padded = models.make(name), models.batch(name)
    whole = {key: torch.cat([value[:1]] * 2) for key, value in padded.items()}
    assert whole["attention_mask"].all()
    assert not padded["attention_mask"].all()
    for batches in ([whole, padded], [padded, whole]):
        scores = estimate_fisher(model, batches, progress=False)
        assert not scores.report.fallback
        both = {key: torch.cat([batch[key] for batch in batches]) for key in padded}
        assert_same(scores, own_loss_loop(model, both))


def test_labels_on_padding_count_like_any_label():
    model, batch = models.make("gpt2"), models.batch("gpt2")
    batch["labels"] = batch["input_ids"].clone()
    assert_same(estimate_fisher(model, [batch], progress=False), own_loss_loop(model, batch))


def test_a_sample_without_labels_has_no_gradient_and_counts():
    model, batch = models.make("gpt2"), models.batch("gpt2")
    batch["labels"][0] = -100
    batch["labels"][3] = -100
    scores = estimate_fisher(model, [batch], progress=False)
    rest = {key: value[[1, 2, 4]] for key, value in batch.items()}
    assert scores.report.samples == 5
    assert_same(scores, {name: total * 3 / 5 for name, total in own_loss_loop(model, rest).items()})


def test_data_of_one_sample():
    for name in ("bert", "gpt2"):
        model, batch = models.make(name), models.batch(name, samples=1)
        assert_same(estimate_fisher(model, [batch], progress=False), own_loss_loop(model, batch))


def test_exactly_the_samples_asked_for_are_used():
    model, batch = models.make("bert"), models.batch("bert", samples=7)
    first = {key: value[:5] for key, value in batch.items()}
    scores = estimate_fisher(model, slices(batch, 2), samples=5, progress=False)
    assert scores.report.positions == [0, 1, 2, 3, 4]
    assert_same(scores, own_loss_loop(model, first))
    assert estimate_fisher(model, slices(batch, 2), samples=100, progress=False).report.samples == 7
    assert estimate_fisher(model, slices(batch, 2), samples=None, progress=False).report.samples == 7


def test_only_the_parameters_asked_for_are_scored():
    model, batch = models.make("llama tied"), models.batch("llama tied")
    reference = own_loss_loop(model, batch)
    # the head's own name of a tied weight means the weight
    names = ["lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"]
    scores = estimate_fisher(model, [batch], names=names, progress=False)
    wanted = ["model.embed_tokens.weight", *names[1:]]
    assert_same(scores, {name: reference[name] for name in wanted})
    assert scores.report.aliases == {"model.embed_tokens.weight": ["lm_head.weight"]}
    for name, p in model.named_parameters():
        p.requires_grad_(name in wanted)
    assert_same(estimate_fisher(model, [batch], progress=False), {name: reference[name] for name in wanted})


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_scored_in_fp32(dtype, device):
    for name in ("bert", "gpt2", "llama tied"):
        model, batch = models.make(name, device, dtype), models.batch(name)
        scores = estimate_fisher(model, [batch], progress=False)
        assert not scores.report.fallback
        single = batch_one_fisher(model, [batch])
        for key, expected in single.items():
            assert scores[key].dtype == torch.float32
            if expected.max() > 1e-4 * max(s.max() for s in single.values()):
                # rounding differs with the batch; what is large must agree
                error = (scores[key] - expected).norm() / expected.norm()
                assert error < 20 * torch.finfo(dtype).eps, f"{name} {key}: {error:.3f}"


def test_verify_compares_and_names_what_differs(monkeypatch):
    model, batch = models.make("bert"), models.batch("bert")
    errors = verify(model, slices(batch, 3))
    assert set(errors) == {name for name, _ in model.named_parameters()}
    assert max(errors.values()) <= BOUND
    from sparseft.fisher import contribution

    # the classic mistake: squares of tokens in place of squares of samples
    def by_token(fisher, lookups, *rest):
        for lookup in lookups:
            fisher.index_add_(0, lookup.ids.flatten(), lookup.dy.flatten(0, 1) ** 2)

    monkeypatch.setattr(contribution, "add_lookups_", by_token)
    with pytest.raises(RuntimeError, match="word_embeddings"):
        verify(model, slices(batch, 3))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_verify_knows_of_autocast(where, monkeypatch):
    model, batch = models.make("bert"), models.batch("bert")
    cast = torch.autocast("cpu", torch.bfloat16)
    if where == "inside":
        model.forward = cast(model.forward)
    with cast if where == "outside" else contextlib.nullcontext():
        assert 1e-4 < max(verify(model, slices(batch, 3)).values()) < 0.02
        # a score that is too large by a tenth is one of the model's errors, not of rounding
        module = importlib.import_module("sparseft.fisher.verify")
        monkeypatch.setattr(module, "batch_one_fisher", lambda *a, **o: wrong(batch_one_fisher(*a, **o)))
        with pytest.raises(RuntimeError, match=r"1 of \d+ parameters .* more than 7\.8e-02: classifier.weight"):
            verify(model, slices(batch, 3))


def wrong(scores):
    return {name: 1.1 * value if name == "classifier.weight" else value for name, value in scores.items()}


def test_the_loop_equals_the_formula():
    # y = W x with squared error: the gradient of sample n is 2 (y - t) outer x
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(4, 3)
    x, t = torch.randn(6, 4, generator=generator), torch.randn(6, 3, generator=generator)
    dy = 2 * (model(x) - t).detach() / 3
    expected = {
        "weight": torch.einsum("no,ni->noi", dy, x).square().mean(0),
        "bias": dy.square().mean(0),
    }
    for scores in (batch_one_fisher(model, [(x, t)]), estimate_fisher(model, [(x, t)], progress=False)):
        for name, value in expected.items():
            torch.testing.assert_close(scores[name], value)


def test_report_prints_what_was_done():
    model, batch = models.make("gpt2"), models.batch("gpt2")
    text = str(estimate_fisher(model, [batch], progress=False).report)
    assert "5 samples" in text
    assert "cross-entropy of the next token" in text
    assert "transformer.wte.weight = lm_head.weight" in text
    assert "1 embedding + linear" in text


@pytest.mark.parametrize("name", ["bert masked", "gpt2", "albert", "t5"])
@pytest.mark.parametrize("most", [3, 32])
def test_small_layers_share_a_launch_and_nothing_changes(name, most, monkeypatch):
    """As on a GPU, here on any device: layers wait for others, also those of tied and repeated weights."""
    monkeypatch.setattr(small_layers, "_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(small_layers, "_MOST", most)
    launches = []
    op = torch.ops.sparseft.fisher_linears_

    def counted(fishers, xs, dys):
        launches.append(len(fishers))
        op(fishers, xs, dys)

    monkeypatch.setattr(small_layers.torch.ops.sparseft, "fisher_linears_", counted)
    model = models.make(name)
    batch = models.batch(name)
    scores = estimate_fisher(model, slices(batch, 3), progress=False)
    assert_same(scores, own_loss_loop(model, batch))
    assert max(launches) == most if most == 3 else max(launches) > 4
