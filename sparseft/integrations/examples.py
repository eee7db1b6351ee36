"""From rows to checked examples: find the task and the columns, number the classes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from sparseft.integrations.rows import Row

Task = Literal["classification", "regression", "causal-lm"]

# of each, the first whose columns are all there is taken
TEXT_COLUMNS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)
PROMPT_COLUMNS = (("instruction", "input", "output"), ("instruction", "output"), ("prompt", "completion"))
LABEL_COLUMNS = ("label", "labels")


@dataclasses.dataclass(frozen=True)
class Example:
    """One checked row.

    Attributes:
        texts: one or two texts; for causal LM a text alone, or the parts of the prompt and, last, the answer.
        label: class number, or a float for regression, or None for causal LM.
    """

    texts: tuple[str, ...]
    label: int | float | None = None


@dataclasses.dataclass(frozen=True)
class Splits:
    """Both splits, and how they were understood.

    Attributes:
        task: what is learnt.
        columns: those of the texts.
        classes: names of the classes, by class number.
        train: examples to train on.
        dev: examples to measure on.
        unlabelled: all columns of the rows, where the task is causal LM because none of them is a label.
    """

    task: Task
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    train: list[Example]
    dev: list[Example]
    unlabelled: tuple[str, ...] = ()


def prepare(
    train: Sequence[Row],
    dev: Sequence[Row],
    task: Literal["auto"] | Task = "auto",
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
) -> Splits:
    """Check the rows of both splits and turn them into examples.

    Args:
        train: rows to train on; they alone decide task, columns and classes.
        dev: rows to measure on; none if nothing is trained.
        task: "auto" takes classification if labels are names or integers, regression if they are floats, and causal
            LM if there are none, but a prompt and its answer, or nothing but a text.
        text_columns: one or two columns; for causal LM one, or those of the prompt and, last, of the answer. Found by
            their usual names if empty.
        label_column: found by its usual names if None.

    Raises:
        ValueError: a column is missing, a text or label is missing or of the wrong kind, or dev has a class that
            train has not, or only one of both has labels.
    """
    if task not in ("auto", *get_args(Task)):
        raise ValueError(f"task must be one of auto, {', '.join(get_args(Task))}, got {task!r}")
    if not train:
        raise ValueError("there must be rows to train on, got none")
    names = list(train[0])
    label = _label_column(names, task, label_column)
    if task != "causal-lm" and dev:
        _check_agreement(names, dev, label)
    columns = _text_columns(names, label, tuple(text_columns))
    texts = [_texts(rows, columns, where) for rows, where in ((train, "train"), (dev, "dev"))]
    if label is None:
        train_part, dev_part = ([Example(text) for text in part] for part in texts)
        return Splits("causal-lm", columns, (), train_part, dev_part, tuple(names) if task == "auto" else ())
    found, classes, targets = _targets(_labels(train, label, "train"), _labels(dev, label, "dev"), task)
    train_part, dev_part = (
        [Example(*pair) for pair in zip(*split, strict=True)] for split in zip(texts, targets, strict=True)
    )
    return Splits(found, columns, classes, train_part, dev_part)


def _label_column(names: list[str], task: str, asked: str | None) -> str | None:
    if task == "causal-lm":
        return None
    if asked is not None:
        _require(names, [asked])
        return asked
    found = next((name for name in LABEL_COLUMNS if name in names), None)
    unlabelled = names == ["text"] or _first_whole(PROMPT_COLUMNS, names) is not None
    if found is None and not (task == "auto" and unlabelled):
        raise ValueError(
            f"the rows must have a column {' or '.join(map(repr, LABEL_COLUMNS))}, got {names}; name the column that "
            "holds the labels, or choose the task causal-lm"
        )
    return found


def _check_agreement(names: list[str], dev: Sequence[Row], label: str | None) -> None:
    """Raise if one split has labels and the other has none."""
    held = {name for row in dev for name in row}
    if label is not None and label not in held:
        labelled, bare, columns = "train", "dev", list(dev[0])
    elif label is None and (found := next((name for name in LABEL_COLUMNS if name in held), None)) is not None:
        labelled, bare, columns, label = "dev", "train", names, found
    else:
        return
    raise ValueError(
        f"the rows of both splits must have labels or none, got a column {label!r} in {labelled} and none in {bare} "
        f"(columns {columns}); give labels to {bare}, or choose the task causal-lm"
    )


def _text_columns(names: list[str], label: str | None, asked: tuple[str, ...]) -> tuple[str, ...]:
    if asked:
        _require(names, asked)
        if label is not None and len(asked) > 2:
            raise ValueError(f"an example with a label must have one or two texts, got the columns {list(asked)}")
        return asked
    choices = TEXT_COLUMNS if label is not None else (*PROMPT_COLUMNS, ("text",))
    found = _first_whole(choices, names)
    if found is None:
        wanted = ", or ".join(" + ".join(choice) for choice in choices)
        raise ValueError(f"the rows must have the columns {wanted}, got {names}; name the columns that hold the text")
    return found


def _first_whole(choices: Sequence[tuple[str, ...]], names: list[str]) -> tuple[str, ...] | None:
    return next((choice for choice in choices if set(choice) <= set(names)), None)


def _require(names: list[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            raise ValueError(f"there is no column {name!r}; the columns are {names}")


def _texts(rows: Sequence[Row], columns: tuple[str, ...], where: str) -> list[tuple[str, ...]]:
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if not isinstance(row.get(column), str):
                raise ValueError(f"{where}, row {number}: {column!r} must be text, got {row.get(column)!r}")
    return [tuple(row[column] for column in columns) for row in rows]


def _labels(rows: Sequence[Row], column: str, where: str) -> list[tuple[str, Any]]:
    """Return for each row where it is, for messages, and its label: a number if it can be read as one, or a name."""
    labels = []
    for number, row in enumerate(rows, start=1):
        place, value = f"{where}, row {number}", row.get(column)
        if not isinstance(value, str | int | float) or value == "":
            raise ValueError(f"{place}: {column!r} must be a name or a number, got {value!r}")
        labels.append((place, value))
    return labels


def _targets(
    train: list[tuple[str, Any]], dev: list[tuple[str, Any]], task: str
) -> tuple[Task, tuple[str, ...], list[list[Any]]]:
    """Return the task, the names of the classes, and the targets of both splits."""
    numbers = [_number(label) for _, label in train]
    numeric = None not in numbers
    if task == "regression" or (task == "auto" and numeric and any(isinstance(value, float) for value in numbers)):
        return "regression", (), [[_target(*label) for label in split] for split in (train, dev)]
    keys = [[_class_key(*label, numeric) for label in split] for split in (train, dev)]
    classes = sorted(set(keys[0]))
    if len(classes) < 2:
        raise ValueError(f"the rows to train on must be of at least two classes, got only {classes[0]!r}")
    ids = {name: number for number, name in enumerate(classes)}
    for (place, label), key in zip(dev, keys[1], strict=True):
        if key not in ids:
            raise ValueError(f"{place}: label {label!r} is unknown; the classes to train on are {_shown(classes)}")
    return "classification", tuple(map(str, classes)), [[ids[key] for key in split] for split in keys]


def _number(label: Any) -> int | float | None:
    # CSV knows only text, so text that reads as a number is one
    for kind in (int, float) if isinstance(label, str) else ():
        try:
            return kind(label)
        except ValueError:
            continue
    return None if isinstance(label, str) else label


def _target(place: str, label: Any) -> float:
    number = _number(label)
    if number is None or not math.isfinite(number):
        raise ValueError(f"{place}: the label must be a finite number for regression, got {label!r}")
    return float(number)


def _class_key(place: str, label: Any, numeric: bool) -> int | str:
    number = _number(label)
    if numeric and number is not None:
        if not math.isfinite(number) or number != int(number):
            raise ValueError(f"{place}: a class must be a name or an integer, got {label!r}; is the task regression?")
        return int(number)
    if not isinstance(label, str):
        raise ValueError(f"{place}: labels must all be names or all numbers, got {label!r} among names")
    return label


def _shown(classes: list[Any]) -> str:
    return ", ".join(map(str, classes[:10])) + (f" and {len(classes) - 10} more" if len(classes) > 10 else "")
