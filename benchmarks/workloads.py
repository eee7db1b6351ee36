"""What is measured: the model, its batch, the tensors, and the ways others do the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import sparseft
from sparseft import testing

# 25 M entries in all, of which half a percent is chosen
TENSORS, ENTRIES, K = 25, 1_000_000, 125_000


def encoder(device: str) -> nn.Module:
    """Return a BERT of MiniLM's shape: 384 wide, 1536 inside, 6 layers, 22.7 M random weights, no dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    # evaluation mode for every contender: the Fisher information is defined there, and dropout would cost the others
    return BertForSequenceClassification(config).to(device).eval()


def batch(device: str, samples: int = 16, tokens: int = 128) -> dict[str, Tensor]:
    """Return random token ids and labels, without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (samples, tokens), generator=generator)
    labels = torch.randint(0, 2, (samples,), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(device) for name, value in inputs.items()}


def forward_backward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Run the ordinary pass: gradients of the batch's mean loss in `.grad`."""
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()


def published_loop(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the Fisher information the way its authors published it: batch size 1, squares added up.

    Source: FISH Mask, arXiv 2111.09839.
    """
    scores = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for sample in _samples(batch):
        model.zero_grad()
        model(**sample).loss.backward()
        for name, parameter in model.named_parameters():
            scores[name] += torch.square(parameter.grad)
    return scores


def tuned_loop(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same with what is easily won: no gradient buffers zeroed, squares added in place."""
    parameters = dict(model.named_parameters())
    scores = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for sample in _samples(batch):
        grads = torch.autograd.grad(model(**sample).loss, list(parameters.values()))
        for score, grad in zip(scores.values(), grads, strict=True):
            score.addcmul_(grad, grad)
    return scores


def sparseft_pass(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the Fisher information by one backward pass, its mean over the samples times their number."""
    return sparseft.estimate_fisher(model, [batch], progress=False)


def forward_backward_flops(model: nn.Module, samples: int, tokens: int) -> int:
    """Return the multiply-adds, times two, of the products of an encoder's pass: weights and attention.

    Each product of the forward pass has two of its size in the backward pass.
    """
    linears = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layer." in name]
    weights = sum(linear.weight.numel() for linear in linears)
    attention = 2 * tokens * model.config.hidden_size * model.config.num_hidden_layers
    return 3 * 2 * samples * tokens * (weights + attention)


def scores(device: str, tensors: int = TENSORS, entries: int = ENTRIES) -> list[Tensor]:
    """Return score tensors with a long tail, as Fisher information has one: u**8 of uniform u."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.rand(entries, generator=generator, device=device).pow_(8) for _ in range(tensors)]


def topk_of_cat(scores: list[Tensor], k: int = K) -> Tensor:
    """Return where the k largest of all scores are in their concatenation, unsorted."""
    return torch.topk(torch.cat(scores), k, sorted=False).indices


def parameters(shapes: list[torch.Size], device: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Return random parameters with random gradients."""
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for shape in shapes:
        parameter = nn.Parameter(torch.randn(shape, generator=generator, device=device).to(dtype))
        parameter.grad = torch.randn(shape, generator=generator, device=device).to(dtype)
        made.append(parameter)
    return made


def selection(params: list[nn.Parameter], density: float) -> list[Tensor]:
    """Return index lists drawn evenly: the hardest case, no two entries share a memory line except by chance."""
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for param in params:
        k = max(1, round(density * param.numel()))
        chosen.append(testing.random_indices(param.numel(), k, generator).to(param.device))
    return chosen


def _samples(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for n in range(len(batch["labels"])):
        yield {name: value[n : n + 1] for name, value in batch.items()}
