"""Losses and modes: per-sample losses are the heads' own, expectations are exact, draws are reproducible."""

import itertools

import models
import pytest
import torch
import torch.nn.functional as F
from exactness import assert_exact, assert_same, slices
from models import one_thread  # noqa: F401
from torch import nn

from sparseft.fisher import batch_one_fisher, estimate_fisher
from sparseft.fisher.loss import Objective

CAUSAL = models.CAUSAL


def losses(model, batch, **options):
    model.eval()
    with torch.no_grad():
        objective = Objective("empirical", None, options.get("reduction", "mean"), 0)
        return objective(model, batch, list(range(len(batch["labels"])))).outputs


@pytest.mark.parametrize("name", models.MODELS)
def test_losses_are_those_of_the_model_for_batches_of_one(name):
    model, batch = models.make(name), models.batch(name)
    ones = [{key: value[n : n + 1] for key, value in batch.items()} for n in range(5)]
    found = losses(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(found, torch.stack([model(**one).loss for one in ones]))
    if name in models.TOKEN_LEVEL:
        counts = [one["labels"][:, 1 if name in CAUSAL else 0 :].ne(-100).sum() for one in ones]
        torch.testing.assert_close(losses(model, batch, reduction="sum"), found * torch.stack(counts))


def test_the_two_token_reductions_are_two_estimates():
    model, batch = models.make("gpt2"), models.batch("gpt2")
    mean = estimate_fisher(model, [batch], progress=False)
    total = estimate_fisher(model, [batch], token_reduction="sum", progress=False)
    one = {key: value[:1] for key, value in batch.items()}
    count = int(one["labels"][:, 1:].ne(-100).sum())
    first = estimate_fisher(model, [one], progress=False)
    first_total = estimate_fisher(model, [one], token_reduction="sum", progress=False)
    assert_same(first_total, {name: score * count**2 for name, score in first.items()})
    # samples weigh differently, so that the two do not even rank parameters alike
    name = "transformer.h.0.mlp.c_fc.weight"
    ratio = total[name] / mean[name]
    assert ratio.max() > 1.5 * ratio.min()


@pytest.mark.parametrize("reduction", ["mean", "sum", "token"])
@pytest.mark.parametrize("name", ["bert masked", "gpt2"])
def test_no_unit_depends_on_the_batch_size(name, reduction):
    model, batch = models.make(name), models.batch(name)
    batch["labels"][3] = -100  # a sample without a label counts, with a gradient of zero
    whole = estimate_fisher(model, [batch], token_reduction=reduction, progress=False)
    assert whole.report.samples == 5
    for size in (1, 3):
        assert_same(estimate_fisher(model, slices(batch, size), token_reduction=reduction, progress=False), whole)


def test_the_report_says_what_was_squared():
    model, batch = models.make("bert masked"), models.batch("bert masked")
    report = estimate_fisher(model, [batch], label_smoothing=0.2, token_reduction="token", progress=False).report
    assert "label smoothing 0.2" in report.loss
    assert "each squared by itself" in str(report)


def test_a_loss_of_ones_own_may_be_given_by_token():
    model, batch = models.make("gpt2"), models.batch("gpt2")

    def by_token(model, batch):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")

    own = estimate_fisher(model, [batch], loss=by_token, token_reduction="token", progress=False)
    assert "by_token" in own.report.loss
    assert_same(own, estimate_fisher(model, [batch], token_reduction="token", progress=False))
    with pytest.raises(ValueError, match=r"one value a token, shape \[1, T\]"):
        estimate_fisher(
            model, [batch], loss=lambda m, b: by_token(m, b).sum(1), token_reduction="token", progress=False
        )


def encoder_decoder(kind):
    import transformers as tf

    shared = {"vocab_size": models.VOCABULARY, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0}
    if kind == "t5":
        return tf.T5ForConditionalGeneration(tf.T5Config(**shared, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return tf.BartForConditionalGeneration(tf.BartConfig(**shared, **sides, **heads, max_position_embeddings=32))


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("reduction", ["mean", "token"])
def test_decoders_are_fed_with_the_labels(kind, reduction):
    torch.manual_seed(0)
    model, batch = encoder_decoder(kind), models.batch("gpt2 classification", samples=3)
    batch["labels"] = torch.randint(2, 20, (3, 6)).masked_fill(torch.arange(6) >= torch.tensor([[6], [3], [4]]), -100)
    model.eval()
    expected = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
    for one in slices(batch, 1):
        out = model(**one)
        log_p = F.log_softmax(out.logits[0], -1)
        labelled = [t for t in range(6) if one["labels"][0, t] != -100]
        losses = [out.loss] if reduction == "mean" else [-log_p[t, one["labels"][0, t]] for t in labelled]
        for loss in losses:
            for key, square in squares(model, loss).items():
                expected[key] += square / 3
    assert_same(estimate_fisher(model, [batch], token_reduction=reduction, progress=False), expected)


def squares(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad**2
        for (name, p), grad in zip(model.named_parameters(), grads, strict=True)
    }


def expectation(model, batch, outcomes):
    """Sum p(y) g(y)^2 over all outcomes of the label: `outcomes(logits)` yields (p, negative log-likelihood)."""
    model.eval()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    count = len(batch["input_ids"])
    scores = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(count):
        logits = model(**{key: value[n : n + 1] for key, value in inputs.items()}).logits[0]
        for probability, loss in outcomes(logits):
            for name, square in squares(model, loss).items():
                scores[name] += probability * square / count
    return scores


def by_class(logits):
    for log_p in F.log_softmax(logits, -1):
        yield log_p.exp().detach(), -log_p


def by_label_set(logits):
    for labels in itertools.product((0.0, 1.0), repeat=len(logits)):
        loss = F.binary_cross_entropy_with_logits(logits, torch.tensor(labels), reduction="sum")
        yield (-loss).exp().detach(), loss


def by_quadrature(logits):
    # three-point Gauss-Hermite: exact for the square of a score that is linear in the draw
    for shift, weight in ((-(3**0.5), 1 / 6), (0.0, 2 / 3), (3**0.5, 1 / 6)):
        yield weight, (logits - (logits.detach() + shift)).square().sum() / 2


@pytest.mark.parametrize(
    ("name", "outcomes"),
    [
        ("llama classification", by_class),
        ("bert multilabel", by_label_set),
        ("bert regression", by_quadrature),
    ],
)
def test_expected_mode_is_the_exact_expectation(name, outcomes):
    model, batch = models.make(name), models.batch(name)
    expected = expectation(model, batch, outcomes)
    batch.pop("labels")
    for scores in (
        estimate_fisher(model, [batch], mode="expected", progress=False),
        batch_one_fisher(model, [batch], mode="expected"),
    ):
        assert_same(scores, expected)


def test_expected_mode_survives_certain_predictions():
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([400.0, 0.0, -400.0]))
    scores = estimate_fisher(model, [torch.randn(5, 4)], mode="expected", progress=False)
    assert scores.report.samples == 5
    assert all(bool((score == 0).all()) for score in scores.values())


def test_expected_mode_of_token_sequences_is_refused():
    model, batch = models.make("gpt2"), models.batch("gpt2")
    with pytest.raises(ValueError, match="sampled"):
        estimate_fisher(model, [batch], mode="expected", progress=False)


@pytest.mark.parametrize("name", ["bert", "bert regression", "bert multilabel", "bert masked", "gpt2"])
def test_draws_depend_on_the_seed_and_on_nothing_else(name):
    model, batch = models.make(name), models.batch(name)
    halves = slices(batch, 3)
    for data in (batch, *halves):
        data.pop("labels")

    def scores(data, seed):
        return estimate_fisher(model, data, mode="sampled", seed=seed, progress=False)

    first = scores([batch], 0)
    key = max(first, key=lambda each: float(first[each].max()))
    for other in (scores([batch], 0), scores(halves, 0), batch_one_fisher(model, [batch], mode="sampled", seed=0)):
        assert_same(other, first)
    assert not torch.allclose(scores([batch], 1)[key], first[key], rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["bert", "bert regression", "bert multilabel"])
def test_draws_converge_to_the_expectation(name):
    model, batch = models.make(name), models.batch(name)
    batch.pop("labels")
    names = ["classifier.weight", "bert.pooler.dense.weight"]
    expected = estimate_fisher(model, [batch], mode="expected", names=names, progress=False)
    draws = 100
    repeated = {key: value.repeat(draws, 1) for key, value in batch.items()}
    sampled = estimate_fisher(model, [repeated], mode="sampled", names=names, samples=None, progress=False)
    for key in names:
        assert (sampled[key] - expected[key]).norm() < 0.25 * expected[key].norm()


def test_a_loss_of_ones_own():
    model, batch = models.make("bert"), models.batch("bert")

    def smoothed(model, batch):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits, batch["labels"], label_smoothing=0.1, reduction="none")

    assert not assert_exact(model, [batch], loss=smoothed).report.fallback
    with pytest.raises(ValueError, match="one value a sample"):
        estimate_fisher(model, [batch], loss=lambda m, b: smoothed(m, b).mean(), progress=False)
    with pytest.raises(ValueError, match="expected"):
        estimate_fisher(model, [batch], loss=smoothed, mode="expected", progress=False)


def test_plain_modules_take_inputs_and_targets():
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5)
    tokens = torch.randint(0, 3, (6, 4)).masked_fill(torch.rand(6, 4) < 0.2, -100)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(20, 3))
    for model, targets, reference in [
        (flat, torch.randint(0, 3, (6,)), lambda y, t: F.cross_entropy(y, t)),
        (flat, torch.randn(6, 3), lambda y, t: F.mse_loss(y, t)),
        (nn.Linear(5, 3), tokens, lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten())),
    ]:
        scores = estimate_fisher(model, [(x, targets)], progress=False)
        singles = [squares(model, reference(model(x[n : n + 1]), targets[n : n + 1])) for n in range(6)]
        assert_same(scores, {name: sum(single[name] for single in singles) / 6 for name in scores})


def test_labels_of_the_wrong_shape_are_named():
    model, batch = models.make("bert multilabel"), models.batch("bert")
    with pytest.raises(ValueError, match=r"\[1, 3\], got \[1\]"):
        estimate_fisher(model, [batch], progress=False)
    model, batch = models.make("gpt2"), models.batch("bert")
    del batch["token_type_ids"]
    with pytest.raises(ValueError, match="one class a token"):
        estimate_fisher(model, [batch], progress=False)


def test_heads_without_a_known_loss_ask_for_one():
    import transformers as tf

    config = tf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
    for model in (tf.BertModel(config), tf.BertForNextSentencePrediction(config)):
        with pytest.raises(ValueError, match="`loss`"):
            estimate_fisher(model, [batch], progress=False)
