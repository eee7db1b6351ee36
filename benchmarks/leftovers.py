"""Models with parameters that no rule captures, and ways to score these: the package's, the loop, and torch.func.

All get a model in which nothing else requires gradients, and return sums of squares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import sparseft
from sparseft.fisher.fallback import Fallback
from sparseft.fisher.loss import Objective, Pullback

Batch = tuple[Tensor, Tensor]
Tensors = dict[str, Tensor]
Run = Callable[[Batch], Tensors]
WORDS, CLASSES = 1000, 3
CHUNK_BYTES = 64 * 2**20  # of gradients of the samples that torch.func takes at a time


class Block(nn.Module):
    """Of a ResNet, with weight norm on its convolutions."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Conv2d(inner, outer, 3, stride, 1, bias=False))
        self.second = parametrizations.weight_norm(nn.Conv2d(outer, outer, 3, 1, 1, bias=False))
        self.norms = nn.ModuleList([nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)])
        self.skip = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the block makes of x [N, C, H, W]."""
        y = self.norms[0](self.first(x)).relu()
        return (self.norms[1](self.second(y)) + self.skip(x)).relu()


class LowRank(nn.Module):
    """Composes a weight of itself and a product of rank 8."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.up = nn.Parameter(0.05 * torch.randn(weight.shape[0], 8))
        self.down = nn.Parameter(0.05 * torch.randn(8, weight.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the composed weight."""
        return weight + self.up @ self.down


class Lstm(nn.Module):
    """An LSTM whose result is its sequence alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(128, 256, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sequence [N, T, H]."""
        sequence: Tensor = self.inner(x)[0]
        return sequence


class Heads(nn.Module):
    """A raw tensor [heads, features, width], contracted by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.06 * torch.randn(4, 256, 64))

    def forward(self, x: Tensor) -> Tensor:
        """Return all heads side by side, [N, T, H]."""
        return torch.einsum("ntd,hde->nthe", x, self.weight).flatten(2).tanh()


class Padded(nn.Module):
    """A BERT with weight norm in its first layer; a text ends at its first word 0, which its mask says."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=WORDS,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
            num_labels=CLASSES,
        )
        self.inner = BertForSequenceClassification(config)
        parametrizations.weight_norm(self.inner.bert.encoder.layer[0].intermediate.dense)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits [N, C]."""
        mask = ids.ne(0).int().cumprod(1)
        logits: Tensor = self.inner(input_ids=ids, attention_mask=mask).logits
        return logits


class Texts(nn.Module):
    """Embeds tokens, runs what is between, classifies the mean."""

    def __init__(self, between: nn.Module, width: int, out: int) -> None:
        super().__init__()
        self.embed, self.between, self.out = nn.Embedding(WORDS, width), between, nn.Linear(out, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits [N, C]."""
        logits: Tensor = self.out(self.between(self.embed(ids)).mean(1))
        return logits


def resnet() -> nn.Module:
    """Return a small ResNet with weight norm."""
    blocks = [Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2)]
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES)
    )


def encoder() -> nn.Module:
    """Return a transformer of four layers whose feed-forward weights are composed."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    inner = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    for each in inner.layers:
        for linear in (each.linear1, each.linear2):
            parametrize.register_parametrization(linear, "weight", LowRank(linear.weight))
    return Texts(inner, 256, 256)


def wav2vec2() -> nn.Module:
    """Return a small Wav2Vec2, whose positional convolution has weight norm."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        conv_dim=(64,) * 7,
        num_conv_pos_embeddings=64,
        classifier_proj_size=64,
        num_labels=CLASSES,
    )
    return Wav2Vec2ForSequenceClassification(config)


# what is scored -> model, shape of its inputs
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet with weight norm, 16 images of 32 x 32": (resnet, (16, 3, 32, 32)),
    "wav2vec2, weight norm in one layer, 8 x 1 s": (wav2vec2, (8, 16000)),
    "transformer of composed weights, 16 x 64 tokens": (encoder, (16, 64)),
    "raw tensor in einsum, 16 x 64 tokens": (lambda: Texts(Heads(), 256, 256), (16, 64)),
    "padded BERT, weight norm in one layer, 16 x 64 tokens": (Padded, (16, 64)),
    "LSTM, 16 x 64 tokens": (lambda: Texts(Lstm(), 128, 256), (16, 64)),
}


def prepared(name: str, device: str) -> tuple[nn.Module, Tensors, Batch]:
    """Return a model in evaluation mode, its parameters that no rule captures, and a batch."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().to(device).eval()
    tokens = isinstance(model, (Texts, Padded))
    inputs = torch.randint(0, WORDS, shape) if tokens else torch.randn(shape)
    if isinstance(model, Padded):
        # every fourth text is as long as the batch
        inputs = inputs.clamp(min=1).masked_fill(
            torch.arange(shape[1]) >= 16 * (1 + torch.arange(shape[0]) % 4)[:, None], 0
        )
    batch = inputs.to(device), torch.randint(0, CLASSES, shape[:1]).to(device)
    left = sparseft.estimate_fisher(model, [batch], progress=False).report.fallback
    if not left:
        raise RuntimeError(f"{name} must have parameters that no rule captures, got none; take it out")
    parameters = dict(model.named_parameters())
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in left)
    return model, {key: parameters[key] for key in left}, batch


def ours(model: nn.Module, leftovers: Tensors) -> Run:
    """Return the fallback of the package; what its first batch costs more, to try torch.func, only that one does."""
    fallback = Fallback(model, Objective("empirical", None, "mean", 0))
    eps = torch.finfo(torch.float32).eps
    # about: a pass measures what is computed from them
    composed = sum(parameter.nbytes for parameter in leftovers.values() if parameter.dim() > 1)

    def run(batch: Batch) -> Tensors:
        sums = zeros(leftovers)
        ones = torch.ones(len(batch[1]), device=batch[1].device)
        for _, grads in fallback.gradients(batch, Pullback(ones, [ones], batch[1]), leftovers, composed, eps):
            for name, rows in grads.items():
                for row in rows:
                    sums[name].addcmul_(row, row)
        return sums

    return run


def loop(model: nn.Module, leftovers: Tensors) -> Run:
    """Return what sums the squares of the gradients that autograd makes, one sample at a time."""

    def run(batch: Batch) -> Tensors:
        sums = zeros(leftovers)
        for x, label in zip(*(part.split(1) for part in batch), strict=True):
            grads = torch.autograd.grad(loss_of(model(x), label), list(leftovers.values()))
            for name, grad in zip(leftovers, grads, strict=True):
                sums[name].addcmul_(grad, grad)
        return sums

    return run


def vmapped(model: nn.Module, leftovers: Tensors) -> Run:
    """Return what sums the squares of the gradients that torch.func makes, of as many samples as have room."""
    from torch.func import functional_call, grad, vmap

    chosen = {name: parameter.detach() for name, parameter in leftovers.items()}

    def loss(chosen: Tensors, x: Tensor, label: Tensor) -> Tensor:
        return loss_of(functional_call(model, chosen, (x[None],)), label[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    size = max(1, CHUNK_BYTES // sum(tensor.nbytes for tensor in chosen.values()))

    def run(batch: Batch) -> Tensors:
        sums = zeros(leftovers)
        for inputs, labels in zip(*(part.split(size) for part in batch), strict=True):
            # not squared in place: the two biases of an LSTM have one gradient between them
            for name, grads in per_sample(chosen, inputs, labels).items():
                sums[name] += grads.square().sum(0)
        return sums

    return run


WAYS: dict[str, Callable[[nn.Module, Tensors], Run]] = {
    "leftovers": ours,
    "leftovers_loop": loop,
    "leftovers_vmap": vmapped,
}


def loss_of(outputs: Any, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(getattr(outputs, "logits", outputs), labels)


def zeros(like: Tensors) -> Tensors:
    """Return zeros of the same shapes."""
    return {name: torch.zeros_like(tensor, requires_grad=False) for name, tensor in like.items()}
