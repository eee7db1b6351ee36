"""Every parameter to 1e-5 in fp32: families of models, their attention, and each way to make a sample's loss.

Against the loop of single samples, and against plain autograd in fp64 with losses that are written out here.
"""

import itertools

import models
import pytest
import test_fisher_experts
import test_fisher_vision
import torch
import torch.nn.functional as F
from exactness import assert_same, slices
from models import one_thread  # noqa: F401
from torch import nn

from sparseft import ops
from sparseft.fisher import batch_one_fisher, estimate_fisher

SMOOTHING = 0.2
KINDS = {
    "plain": {},
    "smoothed": {"label_smoothing": SMOOTHING},
    "sampled": {"mode": "sampled"},
    "expected": {"mode": "expected"},
    "sum": {"token_reduction": "sum"},
    "token": {"token_reduction": "token"},
}
CLASSIFIERS = ("bert", "roberta", "deberta", "albert", "vit", "encoder", "encoder, time first", "resnet")
LABELLED_BY_TOKEN = ("bert masked", "t5", "gpt2", "llama", "gemma", "gemma2", "qwen3", "mixtral")
CAUSAL = (*models.CAUSAL, "mixtral")
# DeBERTa's scores have terms, and Gemma 2's a cap, that fused attention does not know
EAGER_ALONE = ("deberta", "gemma2")
# nothing to choose: torch's layer decides by itself, and convolutions have no attention
OWN = ("encoder", "encoder, time first", "resnet")


class Encoder(nn.Module):
    """nn.TransformerEncoder over padded token ids, classifying the mean of the real tokens."""

    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=batch_first)
        self.embed, self.batch_first = nn.Embedding(models.VOCABULARY, 16, padding_idx=0), batch_first
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, models.CLASSES)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.layers(x, src_key_padding_mask=attention_mask.eq(0))
        y = y if self.batch_first else y.transpose(0, 1)
        return self.head((y * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))


def make(name, attention):
    if name.startswith("encoder"):
        torch.manual_seed(0)
        return Encoder(batch_first=name == "encoder")
    if name == "resnet":
        return test_fisher_vision.make(name)
    model = test_fisher_experts.make(test_fisher_experts.mixtral) if name == "mixtral" else models.make(name)
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    return model


def data(name):
    """Make a ragged batch: padding, and among labels of tokens some that are ignored."""
    if name == "resnet":
        return test_fisher_vision.batch(name)
    return models.batch("llama" if name == "mixtral" else name, samples=4, length=8)


def cells():
    """Return (family, attention, kind) wherever they go together: tokens are no samples of the expected Fisher."""
    found = []
    for name in (*CLASSIFIERS, *LABELLED_BY_TOKEN):
        without = ("expected",) if name in LABELLED_BY_TOKEN else ("sum", "token")
        attentions = ("own",) if name in OWN else ("eager",) if name in EAGER_ALONE else ("eager", "sdpa")
        found += itertools.product([name], attentions, [kind for kind in KINDS if kind not in without])
    return found


def parts(model, one, kind, causal):
    """Yield (share, loss) of one sample: its scores are the squared gradients times their shares, added up."""
    out = model(**one) if hasattr(model, "config") else model(one["input_ids"], one["attention_mask"])
    logits, labels = getattr(out, "logits", out), one["labels"]
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.flatten(0, -2), labels.flatten()
    if kind == "expected":
        for log_p in logits[0].log_softmax(-1):
            yield log_p.exp().item(), -log_p
    elif kind == "token":
        for token in labels.ne(-100).nonzero()[:, 0]:
            yield 1.0, F.cross_entropy(logits[token, None], labels[token, None])
    else:
        reduction, smoothing = "sum" if kind == "sum" else "mean", SMOOTHING if kind == "smoothed" else 0.0
        yield 1.0, F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=smoothing)


def plain_autograd(model, batch, kind, causal):
    """Return the scores by ordinary backward passes in fp64; the model stays in fp64."""
    model.double().eval()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    names, parameters = zip(*model.named_parameters(), strict=True)
    scores = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped products know no fp64
    for one in slices(batch, 1):
        for share, loss in parts(model, one, kind, causal):
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for name, grad in zip(names, grads, strict=True):
                if grad is not None:
                    scores[name] += share * grad**2 / len(batch["labels"])
    return scores


@pytest.mark.parametrize(("name", "attention", "kind"), cells())
def test_every_parameter_is_exact(name, attention, kind):
    model, batch = make(name, attention), data(name)
    scores = estimate_fisher(model, slices(batch, 3), progress=False, **KINDS[kind])
    assert not scores.report.fallback
    assert_same(scores, batch_one_fisher(model, [batch], **KINDS[kind]))
    if kind != "sampled":
        # which labels are drawn is no business of plain autograd
        assert_same(scores, plain_autograd(model, batch, kind, name in CAUSAL))


@pytest.mark.skipif(ops.SERVED_BY["fisher_linear_"]["cpu"] == "reference", reason="the C++ extension is not built")
def test_sums_do_not_depend_on_the_number_of_threads():
    """Bit for bit, given the same x and dy: the loss is linear, so that no product of torch has a say in either."""
    torch.manual_seed(0)
    model, x = nn.Linear(530, 500), torch.randn(12, 33, 530)
    batches = [{"x": each, "dy": torch.randn(len(each), 33, 500)} for each in x.split(5)]

    def loss(model, batch):
        return (model(batch["x"]) * batch["dy"]).sum((1, 2))

    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # one_thread puts back what was there
        found.append(estimate_fisher(model, batches, loss=loss, progress=False))
    assert_same(found[0], batch_one_fisher(model, batches, loss=loss))
    for scores in found[1:]:
        assert all(torch.equal(score, found[0][name]) for name, score in scores.items())
