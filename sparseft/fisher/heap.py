"""The heap of the C library during a pass."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_MOST = 2**31 - 1
_MMAP_BYTES, _TRIM_BYTES = 2**25, 2**26  # where glibc, which moves both, ends by itself in a large process


@contextmanager
def kept_heap() -> Iterator[None]:
    """Let glibc keep what is freed, for the length of a pass on the CPU.

    Each backward pass frees the activations, and glibc would give many back to the system at once: the next batch had
    to take them again page by page, which is a tenth of its time. Afterwards glibc gives back what is freed, from 64
    MiB on. Nothing is done where somebody chose how the heap behaves, or where there is another C library.
    """
    mallopt = _mallopt()
    if mallopt is not None:
        mallopt(_MMAP, _MMAP_BYTES)
        mallopt(_TRIM, _MOST)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_TRIM, _TRIM_BYTES)


def _mallopt() -> Callable[[int, int], int] | None:
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}):
        return None
    library = os.confstr("CS_GNU_LIBC_VERSION") or ""
    return ctypes.CDLL(None).mallopt if library.startswith("glibc") else None
