"""Child-Tuning-F: at every step, another random part of the gradients trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sparseft.mask import Mask, check_mask, match_names
from sparseft.optim.base import SparseOptimizer
from sparseft.schedules.base import Schedule
from sparseft.schedules.draws import generator_at
from sparseft.schedules.masks import whole_mask
from sparseft.selection.arguments import check_number, check_whole


class ChildTuningF(Schedule):
    """Child-Tuning-F: each gradient is kept with probability p, and divided by it, or set to zero: itself in the mean.

    Every step draws anew. The optimizer takes a zero for a gradient like any other, as the paper's algorithm does: it
    enters Adam's moments, so an entry that is not drawn still moves by the momentum of earlier steps, and by decay.
    Which entries train is the mask's affair, which stays what it is.

    Gradients are masked in place, one tensor at a time, when the optimizer is about to step: after accumulation,
    averaging, unscaling and `clip_grad_norm_`, before the optimizer's `max_norm`.

    Args:
        model: the pretrained model.
        optimizer: of this package.
        p: probability that a gradient is kept, in (0, 1].
        mask: what the optimizer trains; None where it trains whole parameters.
        exclude: patterns of parameters whose gradients stay as they are: a new head, say.
        seed: of the draws.

    Raises:
        TypeError: p is no number, or seed no whole one.
        ValueError: p is out of range, exclude leaves nothing over, or the optimizer trains other entries than the
            mask's.

    Source: arXiv 2109.05687. In the published code draws come from torch's global generator, whose state data-parallel
    processes need not share and resumed runs have to restore, one gradient that overflows ruins the moments, and the
    head is drawn like any parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SparseOptimizer,
        p: float,
        mask: Mask | None = None,
        *,
        exclude: str | Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        check_number("p", p)
        check_whole("seed", seed)
        if not 0 < p <= 1:
            raise ValueError(f"the probability of keeping a gradient must lie in (0, 1], got {p}")
        mask = whole_mask(model, optimizer, None, ()) if mask is None else mask
        check_mask(mask)
        trained = [*mask, *mask.dense]
        left_out = match_names(exclude, trained, "exclude")
        self.p, self.seed = p, seed
        self.drawn = [name for name in trained if name not in left_out]
        if not self.drawn:
            raise ValueError("exclude leaves no parameter whose gradients are drawn; leave a pattern of it out")
        super().__init__(model, optimizer, mask)

    def _options(self) -> dict[str, Any]:
        return {"p": self.p, "seed": self.seed, "drawn": self.drawn}

    @torch.no_grad()
    def _judge(self) -> None:
        # a zero times an infinity is still found to be bad, and so is a 16-bit gradient that overflows when divided
        for place, name in enumerate(self.drawn):
            grad = self.model.get_parameter(name).grad
            if grad is not None:
                generator = generator_at(self.seed, self.steps, place, grad.device)
                kept = torch.empty(grad.shape, dtype=torch.bool, device=grad.device).bernoulli_(
                    self.p, generator=generator
                )
                grad.mul_(kept).div_(self.p)
        super()._judge()

    def _after_step(self) -> None:
        """Nothing changes but the draw, which follows from the step."""
