"""Linear layers too small to keep a GPU busy wait for others, and are squared with them in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft import ops  # noqa: F401  (registers torch.ops.sparseft)

_DEVICES = ("cuda",)  # a CPU's threads share the tiles of any layer
_SMALL = 1 << 20  # entries: fewer tiles than a large GPU has multiprocessors
_MOST = 32
_MOST_BYTES = 1 << 26  # of inputs that are kept for it


class SmallLayers:
    """Takes what linear layers contribute, and adds it to their sums at once, or together with what follows."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._bytes = 0

    def add(self, fisher: Tensor, x: Tensor, dy: Tensor, scores: Tensor | None = None) -> None:
        """Do what `fisher_linear_` does, now or before `flush` returns. No parameter may come twice in between.

        scores: as for `fisher_linear_`, which alone can add to them, so that the layer does not wait.
        """
        if scores is not None or fisher.device.type not in _DEVICES or fisher.numel() > _SMALL:
            torch.ops.sparseft.fisher_linear_(fisher, x, dy, None, scores)
            return
        self._waiting.append((fisher, x, dy))
        self._bytes += x.nbytes + dy.nbytes
        if len(self._waiting) == _MOST or self._bytes > _MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Add what waits."""
        if self._waiting:
            fishers, xs, dys = map(list, zip(*self._waiting, strict=True))
            self._waiting, self._bytes = [], 0
            torch.ops.sparseft.fisher_linears_(fishers, xs, dys)
