"""Scores that stay in their files: what a tensor says of its size, and values that are read a block at a time."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sparseft import files
from sparseft.fisher.report import KIND, in_order

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
READS = 3  # of every score, in any scope
_BLOCK = 1 << 18  # scores in memory at once: a block and its keys stay in the second-level cache
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class StoredScore:
    """The scores of one parameter, in a file.

    Args:
        file: the file, open and unbuffered.
        path: of the file, for errors.
        place: where in the file the scores lie.
        read: called with the number of bytes after each read.
    """

    def __init__(self, file: io.FileIO, path: Path, place: files.Place, read: Callable[[int], object]) -> None:
        self.shape = torch.Size(place.shape)
        self.dtype = _DTYPES[place.dtype]
        self._file, self._path, self._begin, self._read = file, path, place.begin, read
        self._state = _state(file)

    def numel(self) -> int:
        """Return the number of scores."""
        return math.prod(self.shape)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first position of each block and its scores: fp32, flat, and there until the next block is read.

        Raises:
            RuntimeError: the file is no longer what it was.
        """
        buffer = torch.empty(min(_BLOCK, self.numel()), dtype=self.dtype)
        for first in range(0, self.numel(), _BLOCK):
            block = buffer[: self.numel() - first]
            self._fill(block, first)
            yield first, block.float()

    def load(self) -> Tensor:
        """Return all scores, in their dtype and shape.

        Raises:
            RuntimeError: the file is no longer what it was.
        """
        scores = torch.empty(self.shape, dtype=self.dtype)
        self._fill(scores.view(-1), 0)
        return scores

    def _fill(self, scores: Tensor, first: int) -> None:
        rest = scores.view(torch.uint8).numpy().data
        self._file.seek(self._begin + first * scores.element_size())
        while rest:
            count = self._file.readinto(rest)
            if not count:
                break
            rest = rest[count:]
        if rest or _state(self._file) != self._state:
            raise RuntimeError(
                f"{self._path} must stay as it is while scores are read from it, but was changed; write to another "
                "path, and select again"
            )
        self._read(scores.nbytes)


def loaded(score: Tensor | StoredScore) -> Tensor:
    """Return scores in memory."""
    return score if isinstance(score, Tensor) else score.load()


@contextlib.contextmanager
def opened(paths: Paths, progress: bool) -> Iterator[dict[str, StoredScore]]:
    """Open safetensors files of scores: parameter name -> its scores, while the files are open.

    Parameters are in the order of the files; those of one that `FisherScores.save` wrote in that of the model, those
    of others as they lie in the file.

    Args:
        paths: one file, or several, which together hold the scores.
        progress: show a bar of the bytes read, if that takes longer than two seconds.

    Raises:
        FileNotFoundError: one of the files is not there.
        TypeError: paths are something else, or a tensor's dtype is not one of scores.
        ValueError: a file is not safetensors, cut short or of another kind; a parameter is in two of them.
    """
    listed = _paths(paths)
    places = _places(listed)
    total = READS * sum(math.prod(place.shape) * _DTYPES[place.dtype].itemsize for _, place in places.values())
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=total, desc="Top-k", unit="B", unit_scale=True, delay=2, disable=not progress)
        )
        handles = {path: stack.enter_context(open(path, "rb", buffering=0)) for path in listed}
        yield {name: StoredScore(handles[path], path, place, bar.update) for name, (path, place) in places.items()}


def _paths(paths: object) -> list[Path]:
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    if not isinstance(several, Sequence) or not all(isinstance(path, (str, os.PathLike)) for path in several):
        raise TypeError(
            f"scores must be a mapping from parameter name to tensor, a safetensors file or a list of such files, "
            f"got {type(paths).__name__}"
        )
    return [Path(path) for path in several]


def _places(paths: list[Path]) -> dict[str, tuple[Path, files.Place]]:
    found: dict[str, tuple[Path, files.Place]] = {}
    for path in paths:
        for name, place in _of_scores(path).items():
            if place.dtype not in _DTYPES:
                raise TypeError(f"scores must be F32, BF16 or F16, got {place.dtype} for {name} in {path}; cast them")
            if name in found:
                raise ValueError(
                    f"every parameter must have its scores in one file, got {name} in {found[name][0]} and {path}"
                )
            found[name] = path, place
    return found


def _of_scores(path: Path) -> dict[str, files.Place]:
    places, metadata = files.places(path)
    kind = metadata.get("format", "")
    if kind == f"sparseft {KIND} 1":
        try:
            return in_order(places, json.loads(metadata["header"]))
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged: its header does not say what it holds; fetch it again") from error
    if kind.startswith("sparseft "):
        raise ValueError(f"{path} must be a file of scores, got a {kind!r} file")
    return places


def _state(file: io.FileIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns
