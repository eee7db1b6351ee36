"""How likely a model thinks responses after a shared prefix: the prefix is read once, and what it left is reused."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sparseft.data.prompts import Target

Measure = Literal["distance", "likelihood"]

# what configurations call the number of tokens that a model takes; MPT has max_seq_len
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


class Reader:
    """Reads prompts and responses, and measures how far the model is from the responses.

    Args:
        model: a causal language model; in evaluation mode, see `evaluation`.
        measure: "distance": the root of the mean of (1 - p)^2 over the response's tokens, p their probabilities given
            all before. "likelihood": the mean of -log p.
        batch_tokens: the most tokens, of prefix and padding too, that are read at once, if more than one response is.
        cache: keep keys and values of a prefix. If not, it is read again for every response.
    """

    def __init__(self, model: nn.Module, measure: Measure, batch_tokens: int, cache: bool) -> None:
        if measure not in get_args(Measure):
            raise ValueError(f"measure must be one of {', '.join(get_args(Measure))}, got {measure!r}")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
        self._model, self._measure, self._batch_tokens, self._cache = model, measure, batch_tokens, cache
        self._device = next(model.parameters()).device
        # logits of a prefix are many, and are not looked at; models of transformers can leave them out
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def distances(self, prefix: list[int], targets: list[Target]) -> Tensor:
        """Return how far the model is from each target's response after the prefix and its tail, fp64 [targets].

        prefix: token ids, at least one.
        """
        found = torch.empty(len(targets), dtype=torch.float64)
        past = self._read(prefix) if self._cache else None
        for places in self._batches(len(prefix), targets):
            batch = [targets[place] for place in places]
            found[places] = self._measured(self._logits(prefix if past is None else [], batch, past), batch).cpu()
        return found

    def check(self, prefix: list[int], target: Target) -> None:
        """Raise unless the model is causal, and its cache, if used, changes nothing."""
        whole = self._logits(prefix, [target], None)[0]
        ended = self._logits(prefix, [Target(target.tail, [])], None)[0]
        if not _alike(ended, whole[: len(target.tail)]):
            raise ValueError(
                "the model must be a causal language model, but what it says of a token depends on later ones"
            )
        if self._cache:
            kept = self._logits([], [target, target], self._read(prefix))
            if not _alike(kept, whole.expand_as(kept)):
                raise RuntimeError(
                    "the model's cache must not change what it computes, but logits differ with it; pass cache=False "
                    "to read the example again for every response"
                )

    def _read(self, prefix: list[int]) -> Any:
        read = self._model(input_ids=self._tensor([prefix]), use_cache=True, **self._last(1))
        past = getattr(read, "past_key_values", None)
        if not hasattr(past, "batch_repeat_interleave"):
            raise RuntimeError(
                f"the model must return a cache that can be repeated for a batch, got {type(past).__name__}; pass "
                "cache=False to read the example again for every response"
            )
        return past

    def _batches(self, prefix: int, targets: list[Target]) -> Iterator[list[int]]:
        """Yield places of targets of similar length that fit into a batch, longest first."""
        order = sorted(range(len(targets)), key=lambda place: -targets[place].length)
        start = 0
        while start < len(order):
            count = max(1, self._batch_tokens // (prefix + targets[order[start]].length))
            yield order[start : start + count]
            start += count

    def _logits(self, prefix: list[int], batch: list[Target], past: Any) -> Tensor:
        """Return the logits at the tokens of targets, [batch, tokens, vocabulary]. Padding is last: none sees it.

        prefix: read before each of them; empty where a past is given in its place.
        """
        rows = [[*prefix, *target.tail, *target.response] for target in batch]
        longest = max(map(len, rows))
        ids = self._tensor([row + [0] * (longest - len(row)) for row in rows])
        if past is None:
            logits: Tensor = self._model(input_ids=ids, use_cache=False, **self._last(longest - len(prefix))).logits
            return logits[:, len(prefix) - longest :]
        past = copy.deepcopy(past)
        past.batch_repeat_interleave(len(batch))
        cached: Tensor = self._model(input_ids=ids, past_key_values=past, use_cache=True).logits
        return cached

    def _last(self, tokens: int) -> dict[str, int]:
        """Return what makes a model compute logits at the last tokens alone, if anything does."""
        return {"logits_to_keep": tokens} if self._keeps else {}

    def _measured(self, logits: Tensor, batch: list[Target]) -> Tensor:
        """Return the distances of targets, fp64 [batch], from logits at their tokens, [batch, tokens, vocabulary]."""
        places = [
            (row, len(target.tail) - 1 + step, step, token)
            for row, target in enumerate(batch)
            for step, token in enumerate(target.response)
        ]
        rows, positions, steps, tokens = self._tensor(places).T
        lost = nn.functional.cross_entropy(logits[rows, positions].float(), tokens, reduction="none").double()
        each = lost if self._measure == "likelihood" else lost.neg().expm1().square()
        # not added at once into a sum for each target, whose order a GPU would not keep
        padded = each.new_zeros(len(batch), max(len(target.response) for target in batch))
        padded[rows, steps] = each
        mean = padded.sum(1) / self._tensor([len(target.response) for target in batch])
        return mean if self._measure == "likelihood" else mean.sqrt()

    def _tensor(self, ids: Any) -> Tensor:
        return torch.tensor(ids, device=self._device)


def context_length(model: nn.Module) -> float:
    """Return how many tokens a model takes; infinity if its configuration does not say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    lengths = [getattr(config, name, None) for name in _LENGTHS]
    return next((length for length in lengths if isinstance(length, int) and length > 0), math.inf)


def vocabulary_size(model: nn.Module) -> float:
    """Return how many tokens a model knows, by its embeddings or its configuration; infinity if neither says."""
    try:
        size = getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        size = None
    if size is None:
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else math.inf


def check_causal(model: nn.Module) -> None:
    """Raise if a model is none, says that it has an encoder, or has no parameter."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"the model must be a causal language model, got {type(model).__name__}, which has an encoder; "
            "use embedding_kernel or fisher_kernel"
        )
    if next(model.parameters(), None) is None:
        raise ValueError(f"the model must have parameters, got {type(model).__name__} without any")


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients; each module's own flag is restored."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag


def _alike(some: Tensor, others: Tensor) -> bool:
    """Return whether logits differ by no more than rounding, which depends on the length of a sequence."""
    centred = others.double() - others.double().mean(-1, keepdim=True)
    difference = float((some.double() - others.double()).norm() / centred.norm())
    # what is not finite is found, and named, where utilities are
    return not difference > (1e-4 if others.dtype == torch.float32 else 0.1)
