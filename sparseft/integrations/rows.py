"""Reading rows from files, and from data sets through the `datasets` library."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_ENDINGS = (".jsonl", ".json", ".csv", ".tsv")


def read(source: str | Path, split: str = "train") -> list[Row]:
    """Read all rows of a file or a data set.

    Args:
        source: a `.jsonl`, `.json` (a list of objects), `.csv` or `.tsv` file; or a folder or hub name for
            `datasets`, as `NAME[@CONFIG][:SPLIT]`, for example `nyu-mll/glue@rte:validation`. Class labels of a data
            set come back as names.
        split: the split of a data set to take if the name does not say it.

    Raises:
        ValueError: the source cannot be read, or holds no rows; a broken line is named by its number.
    """
    path = Path(source)
    if path.suffix in _ENDINGS and not path.is_file():
        raise ValueError(f"{source} is not a file; give one, or a data set as NAME[@CONFIG][:SPLIT]")
    try:
        rows = list(_file_rows(path)) if path.is_file() else _dataset_rows(str(source), split)
    except (UnicodeDecodeError, PermissionError) as error:
        raise ValueError(f"{source} cannot be read ({error}); it must be UTF-8 text that you may read") from error
    if not rows:
        raise ValueError(f"{source} must hold at least one row, got none")
    return rows


def _file_rows(path: Path) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".json":
        return _json_list(path)
    if path.suffix in (".csv", ".tsv"):
        return _csv_rows(path, "," if path.suffix == ".csv" else "\t")
    raise ValueError(f"{path} must end in {', '.join(_ENDINGS)}, got {path.suffix or 'no ending'!r}; rename it")


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: is not JSON ({error.msg}); give one object a line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: must be an object, got {type(row).__name__}")
            yield row


def _json_list(path: Path) -> Iterator[Row]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: is not JSON ({error.msg})") from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path} must hold a list of objects; a file with one object a line must end in .jsonl")
    yield from found


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                # DictReader files surplus fields under None, and fills missing ones with None
                if None in row or None in row.values():
                    wanted = len(reader.fieldnames or [])
                    raise ValueError(f"{path}, line {reader.line_num}: must have {wanted} fields, as the header has")
                yield row
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: is not CSV ({error})") from error


def _dataset_rows(source: str, split: str) -> list[Row]:
    import datasets

    name, _, asked = source.partition(":")
    name, _, config = name.partition("@")
    try:
        found = datasets.load_dataset(name, config or None, split=asked or split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{source} is neither a file nor a data set that could be loaded: {reason}") from error
    rows = [dict(row) for row in found]
    for column, feature in found.features.items():
        if isinstance(feature, datasets.ClassLabel):
            for row in rows:
                # -1 marks rows whose label is withheld
                row[column] = None if row[column] in (None, -1) else feature.int2str(row[column])
    return rows
