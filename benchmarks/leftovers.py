"""Models with parameters that no rule captures, and two ways to score these: the loop of the package, and torch.func.

Both get a model in which nothing else requires gradients, and both return sums of squares.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import sparseft
from sparseft.fisher.fallback import one_by_one
from sparseft.fisher.loss import Objective

Batch = tuple[Tensor, Tensor]
Tensors = dict[str, Tensor]
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
    "LSTM, 16 x 64 tokens": (lambda: Texts(Lstm(), 128, 256), (16, 64)),
}


def prepared(name: str, device: str) -> tuple[nn.Module, Tensors, Batch]:
    """Return a model in evaluation mode, its parameters that no rule captures, and a batch."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().to(device).eval()
    tokens = isinstance(model, Texts)
    inputs = torch.randint(0, WORDS, shape) if tokens else torch.randn(shape)
    batch = inputs.to(device), torch.randint(0, CLASSES, shape[:1]).to(device)
    left = sparseft.estimate_fisher(model, [batch], progress=False).report.fallback
    if not left:
        raise RuntimeError(f"{name} must have parameters that no rule captures, got none; take it out")
    parameters = dict(model.named_parameters())
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in left)
    return model, {key: parameters[key] for key in left}, batch


def loop(model: nn.Module, leftovers: Tensors, batch: Batch) -> Tensors:
    """Sum the squares of the gradients that the fallback makes, one sample at a time."""
    sums = _zeros(leftovers)
    objective = Objective("empirical", None, "mean", 0)
    for _, grads in one_by_one(model, objective, batch, list(range(len(batch[0]))), leftovers):
        for name, grad in grads.items():
            sums[name].addcmul_(grad, grad)
    return sums


def vmapped(model: nn.Module, leftovers: Tensors, batch: Batch) -> Tensors:
    """Sum the squares of the gradients that torch.func makes, of as many samples at a time as have room for them."""
    from torch.func import functional_call, grad, vmap

    chosen = {name: parameter.detach() for name, parameter in leftovers.items()}

    def loss(chosen: Tensors, x: Tensor, label: Tensor) -> Tensor:
        outputs = functional_call(model, chosen, (x[None],))
        return F.cross_entropy(getattr(outputs, "logits", outputs), label[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    sums = _zeros(leftovers)
    size = max(1, CHUNK_BYTES // sum(tensor.nbytes for tensor in chosen.values()))
    for inputs, labels in zip(*(part.split(size) for part in batch), strict=True):
        # not squared in place: the two biases of an LSTM have one gradient between them
        for name, grads in per_sample(chosen, inputs, labels).items():
            sums[name] += grads.square().sum(0)
    return sums


WAYS: dict[str, Callable[[nn.Module, Tensors, Batch], Tensors]] = {
    "leftovers_loop": loop,
    "leftovers_vmap": vmapped,
}


def _zeros(like: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor, requires_grad=False) for name, tensor in like.items()}
