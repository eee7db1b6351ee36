"""From examples to token ids, and from those to padded batches."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseft.integrations.examples import Example, Splits, Task

Features = dict[str, Any]
Batch = dict[str, Tensor]
_IGNORED = -100  # what transformers' losses leave out


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Both splits as token ids, cut at max_length. `collate` pads a list of features into a batch with "labels"."""

    task: Task
    max_length: int
    train: list[Features]
    dev: list[Features]
    collate: Callable[[list[Features]], Batch]

    def batches(
        self, split: Sequence[Features], batch_size: int, device: torch.device | str, seed: int | None = None
    ) -> torch.utils.data.DataLoader[Batch]:
        """Return the batches of a split on a device, in order or shuffled by a seed; may be iterated repeatedly."""

        def collate(features: list[Features]) -> Batch:
            return {name: tensor.to(device) for name, tensor in self.collate(features).items()}

        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return torch.utils.data.DataLoader(
            split,  # type: ignore[arg-type]
            batch_size,
            shuffle=generator is not None,
            generator=generator,
            collate_fn=collate,
        )


def encode(splits: Splits, tokenizer: Any, max_length: int | None = None) -> Encoded:
    """Turn both splits into token ids, cut at `max_length` tokens; None is for 128, or less if the model takes less.

    For causal LM, a text alone is learnt whole, and of a prompt with its answer only the answer; each row is a
    sequence of its own and ends with the tokenizer's end token.

    Raises:
        ValueError: max_length is out of range, or leaves nothing to learn from in any row.
    """
    limit = tokenizer.model_max_length
    max_length = min(128, limit) if max_length is None else max_length
    if not 2 <= max_length <= limit:
        raise ValueError(f"max_length must lie in [2, {limit}] for this tokenizer, got {max_length}")
    if splits.task == "causal-lm":
        from transformers import DataCollatorForSeq2Seq

        train, dev = (
            _sequences(part, where, splits.columns, tokenizer, max_length)
            for part, where in ((splits.train, "train"), (splits.dev, "dev"))
        )
        return Encoded(
            splits.task, max_length, train, dev, DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=_IGNORED)
        )
    from transformers import DataCollatorWithPadding

    train, dev = (_labelled(part, tokenizer, max_length) for part in (splits.train, splits.dev))
    return Encoded(splits.task, max_length, train, dev, DataCollatorWithPadding(tokenizer))


def _labelled(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Features]:
    if not examples:
        return []
    texts = [list(column) for column in zip(*(example.texts for example in examples), strict=True)]
    columns = tokenizer(*texts, truncation=True, max_length=max_length)
    return [
        {**{name: values[i] for name, values in columns.items()}, "labels": example.label}
        for i, example in enumerate(examples)
    ]


def _sequences(
    examples: Sequence[Example], where: str, columns: tuple[str, ...], tokenizer: Any, max_length: int
) -> list[Features]:
    found = [_sequence(example.texts, columns, tokenizer, max_length) for example in examples]
    # the first token is never predicted
    kept = [features for features in found if any(label != _IGNORED for label in features["labels"][1:])]
    if found and not kept:
        raise ValueError(f"{where}: no row has anything to learn within {max_length} tokens; raise max_length")
    if len(kept) < len(found):
        warnings.warn(
            f"{where}: left out {len(found) - len(kept)} of {len(found)} rows, which have nothing to learn within "
            f"{max_length} tokens",
            stacklevel=3,
        )
    return kept


def _sequence(texts: tuple[str, ...], columns: tuple[str, ...], tokenizer: Any, max_length: int) -> Features:
    *parts, answer = texts
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # special tokens that open a sequence stand before the prompt, or before the text if there is none
    start = tokenizer(_prompt(parts, columns) if parts else answer)["input_ids"]
    if start[-1:] == end:
        start = start[:-1]
    rest = tokenizer(answer, add_special_tokens=False)["input_ids"] if parts else []
    ids = (start + rest + end)[:max_length]
    labels = [_IGNORED] * min(len(start), len(ids)) + ids[len(start) :] if parts else list(ids)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _prompt(parts: Sequence[str], columns: tuple[str, ...]) -> str:
    if columns == ("prompt", "completion"):
        return parts[0]
    return "".join(f"{part}\n\n" for part in parts if part)
