"""Rows of a kernel that take long to compute, written in blocks as they are finished, and read when going on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparseft import files

_ROWS = 32  # of a block: at most as many are computed again after an interruption


class Blocks:
    """A kernel that is filled row by row.

    Args:
        folder: where blocks are written, and read if they are there; None keeps everything in memory.
        rows: of the kernel.
        columns: of the kernel.
        identity: of what it is computed from; blocks of something else are refused.

    Raises:
        ValueError: the folder holds blocks of something else, is a file, or its parent is not there.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, rows: int, columns: int, identity: str) -> None:
        self.kernel = torch.full((rows, columns), torch.nan)
        self._folder, self._identity = None if folder is None else Path(folder), identity
        self._done = torch.zeros(rows, dtype=torch.bool)
        if self._folder is not None:
            if not self._folder.parent.is_dir():
                raise ValueError(f"there is no folder {self._folder.parent} for the checkpoint; make it first")
            if self._folder.exists() and not self._folder.is_dir():
                raise ValueError(
                    f"checkpoint must be a folder, got {self._folder}, which is a file; give another path"
                )
            self._folder.mkdir(exist_ok=True)
            for path in sorted(self._folder.glob("rows-*.safetensors")):
                self._read(path)

    @property
    def finished(self) -> int:
        """How many rows there are."""
        return int(self._done.sum())

    def missing(self) -> Iterator[int]:
        """Yield the rows that are not there."""
        yield from (~self._done).nonzero()[:, 0].tolist()

    def add(self, row: int, values: Tensor) -> None:
        """Put in a row; what ends a block writes it."""
        self.kernel[row], self._done[row] = values, True
        start = row // _ROWS * _ROWS
        stop = min(start + _ROWS, len(self.kernel))
        if self._folder is not None and row == stop - 1:
            header = {"identity": self._identity, "start": start}
            path = self._folder / f"rows-{start:08}.safetensors"
            files.save(path, "utility block", {"rows": self.kernel[start:stop]}, header)

    def _read(self, path: Path) -> None:
        tensors, header = files.load(path, "utility block")
        if header["identity"] != self._identity:
            raise ValueError(
                f"{path} must be of the same model, samples and options to go on from, but it is of others; give "
                "another folder"
            )
        rows = tensors["rows"]
        stop = header["start"] + len(rows)
        self.kernel[header["start"] : stop], self._done[header["start"] : stop] = rows, True
