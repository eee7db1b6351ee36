"""The log of a search: one JSON line for each evaluation, written before the next begins."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseft.files import check_folder


class Log:
    """Figures by what they are of, in memory and, if there is a path, in a file that a later search goes on with.

    The first line says which search it is of. A last line without its end, which a crash leaves behind, is cut off.

    Args:
        path: the file; None for a log in memory alone.
        header: what the search depends on, plain JSON values.

    Raises:
        FileNotFoundError: the folder of the file is not there.
        ValueError: the file is of another search, or no log.
    """

    def __init__(self, path: str | os.PathLike[str] | None, header: Mapping[str, Any]):
        self._path = None if path is None else Path(path)
        self._figures: dict[str, float] = {}
        if self._path is not None:
            check_folder(self._path)
            first = {"format": "sparseft design space search 1", **header}
            if self._path.exists():
                self._read(self._path, first)
            if not self._path.exists() or not self._path.stat().st_size:
                _append(self._path, first)

    def get(self, what: Mapping[str, Any]) -> float | None:
        """Return the figure of an evaluation, None if it has not been made."""
        return self._figures.get(_key(what))

    def add(self, what: Mapping[str, Any], figure: float) -> None:
        """Keep the figure of an evaluation; it is on the disk when this returns."""
        if self._path is not None:
            _append(self._path, {**what, "figure": figure})
        self._figures[_key(what)] = figure

    def _read(self, path: Path, first: Mapping[str, Any]) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            differ = [key for key, value in first.items() if lines and lines[0].get(key) != value]
            if differ:
                raise ValueError(f"it is of a search with other {', '.join(differ)}")
            for line in lines[1:]:
                figure = line.pop("figure")
                self._figures[_key(line)] = float(figure)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be gone on with: {error}; give another path") from error
        if len(whole) < len(data):
            with open(path, "r+b") as file:
                file.truncate(len(whole))


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _key(what: Mapping[str, Any]) -> str:
    return json.dumps(what, sort_keys=True)
