"""What was known of the tensors of a region's operations, in order, for when the region runs again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# of a tensor: the parameters that it is computed from and that all samples share it with, none if it is an input
Fact = frozenset[str] | None
Line = tuple[Callable[..., Any], list[Fact]]


class Transcript:
    """Is written when operations run first, and read when they run again."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._place: int | None = None

    def here(self) -> Callable[[], Transcript]:
        """Return what makes a transcript to read from the next operation on."""
        place = len(self._lines) if self._place is None else self._place

        def reading() -> Transcript:
            transcript = Transcript()
            transcript._lines, transcript._place = self._lines, place
            return transcript

        return reading

    def known(self, func: Callable[..., Any]) -> Sequence[Fact]:
        """Return what was known of the tensors of the next operation, if this may be it; nothing while it writes."""
        line = self._next()
        return line[1] if line is not None and line[0] == func else ()

    def pass_over(self, func: Callable[..., Any], facts: list[Fact]) -> None:
        """Write down an operation that has run, or go on to the next if it is the one that was written down."""
        if self._place is None:
            self._lines.append((func, facts))
            return
        line = self._next()
        if line is None or line[0] != func:
            first = "nothing" if line is None else _name(line[0])
            raise RuntimeError(f"a checkpointed region ran {_name(func)} where it had run {first} at first")
        self._place += 1

    def _next(self) -> Line | None:
        if self._place is None or self._place >= len(self._lines):
            return None
        return self._lines[self._place]


def _name(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__name__", func))
