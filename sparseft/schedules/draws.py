"""Random numbers of schedules: a resumed run draws the same, and so does every process of a distributed one."""

from __future__ import annotations

import torch

from sparseft.low_bits import mix, mixed_seed


def generator_at(seed: int, step: int, place: int, device: torch.device) -> torch.Generator:
    """Return a generator on a device whose numbers follow from seed, step and place alone.

    place: which of the tensors that are drawn at a step.
    """
    return torch.Generator(device).manual_seed(mix(mix(mixed_seed(seed) ^ step) ^ place))
