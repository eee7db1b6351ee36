"""What pictures are drawn on."""

from __future__ import annotations

from typing import Any


def figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, of so many inches.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "a picture needs matplotlib, which is not installed; pip install 'sparseft[plot]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
