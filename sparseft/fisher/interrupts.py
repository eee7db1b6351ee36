"""Ctrl-C that waits for the end of a batch, so that the batch is not lost, nor half of it counted."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Interrupts:
    """Holds SIGINT back where it is told to, until that is over; a second one goes through at once.

    Enter it around all of that. Signals are the main thread's: in others, and where SIGINT has no handler of Python's
    to hand it on to, nothing changes.

    Args:
        active: False changes nothing either.
    """

    def __init__(self, *, active: bool) -> None:
        self._active = active
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._held = self._came = False

    def __enter__(self) -> Interrupts:
        handler = signal.getsignal(signal.SIGINT)
        if self._active and callable(handler) and threading.current_thread() is threading.main_thread():
            self._handler = handler
            signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold SIGINT back until the block is left, and hand it on then."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self._came:
                self._hand_on(signal.SIGINT, None)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._held and not self._came:
            self._came = True
        else:
            self._hand_on(number, frame)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._came = False
        if self._handler is not None:
            self._handler(number, frame)
