"""The samples that were chosen: which, what each is worth, and why it was taken."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseft import files
from sparseft.data.greedy import Greedy
from sparseft.data.objectives import Coverage

_NAMED = 3  # samples that a reason names
_SHOWN = 5  # indices in a repr


class Reason(NamedTuple):
    """Why a sample was chosen.

    Attributes:
        gain: what it added to the objective when it was chosen.
        represents: how many samples it stands for: those that it helps more than any other chosen one does, and more
            than what was there before.
        most: of these, the ones it adds most for, each with its entry in the kernel.
    """

    gain: float
    represents: int
    most: list[tuple[int, float]]

    def __str__(self) -> str:
        if not self.represents:
            return f"gain {self.gain:.4g}; stands for no sample that another chosen one does not stand for as well"
        named = ", ".join(f"{sample} ({value:.4g})" for sample, value in self.most)
        samples = "1 sample" if self.represents == 1 else f"{self.represents} samples"
        return f"gain {self.gain:.4g}; stands for {samples}, most of all for {named}"


@dataclass(frozen=True, eq=False, repr=False)
class ChosenSamples:
    """Samples of a pool, in the order in which they were chosen: the first k are the choice for k, if none has a cost.

    Attributes:
        indices: their positions in the pool, plain numbers: `torch.utils.data.Subset(pool, chosen.indices)`.
        gains: fp64 [k], what each added to the objective.
        value: of the objective for all of them.
        reasons: one each.
        represented_by: int64 [samples], which place in `indices` stands for each sample; -1 if none does.
        info: how they were chosen, plain values; with costs also "cost", what all of them do together.
    """

    indices: list[int]
    gains: Tensor
    value: float
    reasons: list[Reason]
    represented_by: Tensor
    info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        """Return how many there are, the first of them, their value and the stage, in one line."""
        first = ", ".join(map(str, self.indices[:_SHOWN])) + (", ..." if len(self) > _SHOWN else "")
        stage = self.info.get("stage", "unknown")
        return f"ChosenSamples({len(self)} samples: {first}; value {self.value:.4g}, stage {stage})"

    @classmethod
    def made(
        cls, found: Greedy, owner: Tensor, worth: Tensor, kernel: Tensor, value: float, info: dict[str, Any]
    ) -> ChosenSamples:
        """Return what was found, with reasons from who stands for whom, and what that is worth."""
        places: list[list[int]] = [[] for _ in found.indices]
        for sample in worth.argsort(descending=True, stable=True).tolist():
            if owner[sample] >= 0:
                places[int(owner[sample])].append(sample)
        indices = found.indices.tolist()
        reasons = [
            Reason(gain, len(own), [(sample, float(kernel[index, sample])) for sample in own[:_NAMED]])
            for index, gain, own in zip(indices, found.gains.tolist(), places, strict=True)
        ]
        return cls(indices, found.gains, value, reasons, owner, info)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a safetensors file, or leave what is there as it was.

        Raises:
            OSError: the file could not be written.
        """
        tensors = {"indices": torch.tensor(self.indices), "gains": self.gains, "represented_by": self.represented_by}
        header = {"value": self.value, "info": self.info, "reasons": [list(reason) for reason in self.reasons]}
        files.save(path, "chosen samples", tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ChosenSamples:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged or something else.
        """
        tensors, header = files.load(path, "chosen samples")
        reasons = [
            Reason(gain, represents, [(sample, value) for sample, value in most])
            for gain, represents, most in header["reasons"]
        ]
        return cls(
            tensors["indices"].tolist(),
            tensors["gains"],
            header["value"],
            reasons,
            tensors["represented_by"],
            header["info"],
        )


def owners(function: Coverage, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return which place in `indices` stands for each sample, int64 [represented], and what that adds, fp32.

    Of those that stand for a sample equally well, it is the first chosen; -1 where none adds anything.
    """
    similarity, floor, cap, _ = (part.cpu() for part in function)
    covered, owner = floor.clone(), torch.full(floor.shape, -1)
    for place, index in enumerate(indices.tolist()):
        reached = torch.minimum(similarity[index], cap)
        better = reached > covered
        owner[better] = place
        covered[better] = reached[better]
    return owner, covered - floor
