"""An excerpt of a batch: a few tokens of each sample show how a model lays out its samples as well as all of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparseft.fisher.batches import Batch

_TOKENS = 4
_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels")


def excerpt(batch: Batch) -> Batch | None:
    """Return the batch with the same window of 4 tokens cut out of every sample; None if it cannot be cut.

    It can where token ids [N, T] and what lies beside them are the only inputs of that length. In the window no sample
    is padded, not all are the same, as in the words of a template, and, where labels are given by token, each has two.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2 * _TOKENS:
        return None
    length = ids.shape[1]
    sized = {key for key, value in batch.items() if isinstance(value, Tensor) and length in value.shape[1:]}
    if not all(key in _BY_TOKEN and batch[key].dim() == 2 for key in sized):
        return None
    for start in [*range(0, length - _TOKENS, _TOKENS), length - _TOKENS]:
        window = slice(start, start + _TOKENS)
        whole = "attention_mask" not in sized or bool(batch["attention_mask"][:, window].ne(0).all())
        labelled = "labels" not in sized or bool((batch["labels"][:, window].ne(-100).sum(1) >= 2).all())
        differ = len(ids) == 1 or bool(ids[1:, window].ne(ids[:1, window]).any())
        if whole and labelled and differ:
            return {key: value[:, window] if key in sized else value for key, value in batch.items()}
    return None
