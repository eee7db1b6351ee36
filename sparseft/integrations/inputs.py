"""All that a run starts from, in one call: rows, model and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from sparseft.integrations import encoding, examples, models, rows


class Inputs(NamedTuple):
    """A model, as it was loaded, and the data it is to learn, as text and as token ids."""

    source: str
    splits: examples.Splits
    loaded: models.Loaded
    encoded: encoding.Encoded


def load(
    model: str,
    train: str,
    dev: str | None,
    *,
    task: Literal["auto"] | examples.Task = "auto",
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    max_length: int | None = None,
    dtype: str = "auto",
    seed: int = 0,
) -> Inputs:
    """Read the data, then load the model; each step says in its own module what it takes and what it refuses.

    Args:
        model: folder or hub id, see `models.load`.
        train: where the training rows are, see `rows.read`.
        dev: where the rows to measure on are; None if nothing is trained.
        task: see `examples.prepare`, as for the columns.
        text_columns: see `examples.prepare`.
        label_column: see `examples.prepare`.
        max_length: tokens after which a sequence is cut, see `encoding.encode`.
        dtype: what the weights are held in, see `models.load`.
        seed: initialises a new head.
    """
    dev_rows = [] if dev is None else rows.read(dev, "validation")
    splits = examples.prepare(rows.read(train), dev_rows, task, text_columns, label_column)
    loaded = models.load(model, splits, seed=seed, dtype=dtype)
    return Inputs(model, splits, loaded, encoding.encode(splits, loaded.tokenizer, max_length))
