"""What is measured: the model, its batch, the tensors, and the ways others do the same."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparseft

Batch = dict[str, Tensor]
# 25 M entries in all, of which half a percent is chosen
TENSORS, ENTRIES, K = 25, 1_000_000, 125_000


def encoder(device: str) -> nn.Module:
    """Return a BERT of MiniLM's shape: 384 wide, 1536 inside, 6 layers, 22.7 M random weights, no dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    # evaluation mode for every contender that runs in it: the Fisher information is defined there
    return BertForSequenceClassification(config).to(device).eval()


def decoder(device: str, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> nn.Module:
    """Return a Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).to(dtype).eval()


MODELS = {
    "MiniLM": encoder,
    "Llama of 8 layers": functools.partial(
        decoder,
        dtype=torch.float32,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=8192,
    ),
    "Llama of 1.36 B": functools.partial(
        decoder,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        vocab_size=32000,
    ),
    "Llama of 3.2 B": functools.partial(
        decoder,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
}
IDS = {"Llama of 8 layers": 8192}  # the vocabularies that are small


def batches(name: str, device: str, number: int, samples: int, tokens: int) -> list[Batch]:
    """Return batches for a model, of random token ids and labels, without padding."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(number):
        ids = torch.randint(1000, IDS.get(name, 30000), (samples, tokens), generator=generator)
        classes = torch.randint(0, 2, (samples,), generator=generator)
        labels = classes if MODELS[name] is encoder else ids
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        made.append({key: value.to(device) for key, value in inputs.items()})
    return made


def forward_backward(model: nn.Module, data: list[Batch]) -> None:
    """Run the ordinary pass: gradients of each batch's mean loss in `.grad`."""
    for batch in data:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()


def published_loop(model: nn.Module, data: list[Batch]) -> dict[str, Tensor]:
    """Return the Fisher information, summed over samples, as its authors compute it: batch size 1, squares added up.

    Source: FISH Mask, arXiv 2111.09839.
    """
    scores = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in model.named_parameters()}
    for sample in _samples(data):
        model.zero_grad()
        model(**sample).loss.backward()
        for name, parameter in model.named_parameters():
            scores[name] += torch.square(parameter.grad)
    return scores


def tuned_loop(model: nn.Module, data: list[Batch]) -> dict[str, Tensor]:
    """Return the same with what is easily won: no `.grad`, squares added in place."""
    parameters = dict(model.named_parameters())
    scores = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    for sample in _samples(data):
        grads = torch.autograd.grad(model(**sample).loss, list(parameters.values()))
        for score, grad in zip(scores.values(), grads, strict=True):
            score.addcmul_(grad, grad)
    return scores


def estimate_fisher(model: nn.Module, data: list[Batch]) -> dict[str, Tensor]:
    """Return the Fisher information, its mean over samples, in one backward pass a batch."""
    return sparseft.estimate_fisher(model, data, progress=False)


PASSES = {
    "estimate_fisher": estimate_fisher,
    "forward_backward": forward_backward,
    "published_loop": published_loop,
    "tuned_loop": tuned_loop,
}


def forward_backward_flops(model: nn.Module, data: list[Batch]) -> int:
    """Return the multiply-adds, times two, of the matrix products of a pass: weights at every token, and attention.

    Each product of the forward pass has two of its size in the backward pass.
    """
    once = ("pooler", "classifier")
    linears = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in once)
    ]
    weights = sum(linear.weight.numel() for linear in linears)
    flops = 0
    for batch in data:
        samples, tokens = batch["input_ids"].shape
        attention = 2 * tokens * model.config.hidden_size * model.config.num_hidden_layers
        if hasattr(model, "lm_head"):  # a decoder looks back only
            attention //= 2
        flops += 3 * 2 * samples * tokens * (weights + attention)
    return flops


def scores(device: str, tensors: int = TENSORS, entries: int = ENTRIES) -> list[Tensor]:
    """Return score tensors with a long tail, as Fisher information has one: u**8 of uniform u."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.rand(entries, generator=generator, device=device).pow_(8) for _ in range(tensors)]


def topk_of_cat(scores: list[Tensor], k: int = K) -> Tensor:
    """Return where the k largest of all scores are in their concatenation, unsorted."""
    return torch.topk(torch.cat(scores), k, sorted=False).indices


def save_scores(path: str, tensors: int, entries: int = ENTRIES) -> None:
    """Write the same scores to a safetensors file."""
    save_file({f"layer.{i}.weight": score for i, score in enumerate(scores("cpu", tensors, entries))}, path)


def topk_of_loaded(path: str, k: int) -> Tensor:
    """Return where the k largest scores of a file are, having loaded them all."""
    return topk_of_cat(list(load_file(path).values()), k)


def topk_of_file(path: str, k: int) -> sparseft.Mask:
    """Return the same as a mask; the scores stay in their file."""
    return sparseft.top_k(path, k=k, progress=False)


def parameters(shapes: list[torch.Size], device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return random parameters with random gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    made: list[Tensor] = []
    for shape in shapes:
        made.append(nn.Parameter(random(shape)))
        made[-1].grad = random(shape)
    return made


def selection(tensors: list[Tensor], density: float) -> list[Tensor]:
    """Return index lists drawn evenly: the hardest case, no two entries share a memory line except by chance."""
    device = tensors[0].device
    generator = torch.Generator(device).manual_seed(0)
    chosen = []
    for tensor in tensors:
        k = max(1, round(density * tensor.numel()))
        order = torch.randperm(tensor.numel(), generator=generator, device=device)
        chosen.append(order[:k].sort().values.int())
    return chosen


def _samples(data: list[Batch]) -> Iterator[Batch]:
    for batch in data:
        for n in range(len(batch["labels"])):
            yield {name: value[n : n + 1] for name, value in batch.items()}
