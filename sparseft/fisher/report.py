"""What comes out of a pass: the scores, and how they were made."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from sparseft import files

KIND = "fisher"
_UNREACHED = "there was no gradient"
_SHOWN = 3  # parameters that a warning names
_T = TypeVar("_T")


@dataclass
class FisherReport:
    """How a Fisher estimate was made.

    Attributes:
        mode: "empirical", "expected" or "sampled".
        loss: the loss of one sample, in words; the unit of the scores is (this / parameter)^2.
        positions: where the samples used stand in the data.
        dropped: where the samples stand that had a non-finite loss or gradient; they count nowhere.
        rules: parameter name -> the rules that served it: "linear", "conv", "experts", "bmm", "embedding",
            "norm", "bias", "elementwise", "data" (a small parameter that is itself the data of an operation),
            "fallback" (whole gradients of single samples), or "unused" (the loss does not depend on it).
        fallback: parameter name -> why no rule could serve it.
        way: how the fallback took the samples: several at a time, or one, and why; "" without a fallback.
        aliases: name of a tied parameter -> its other names.
        settings: the options that the scores depend on; "autocast" is among them where it was on: its dtype.
        fingerprint: of the model's weights and buffers.
        data: checksum of the samples seen; 0 unless the pass kept a checkpoint.
    """

    mode: str
    loss: str = ""
    positions: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    rules: dict[str, str] = field(default_factory=dict)
    fallback: dict[str, str] = field(default_factory=dict)
    way: str = ""
    aliases: dict[str, list[str]] = field(default_factory=dict)
    settings: dict[str, str | float] = field(default_factory=dict)
    fingerprint: str = ""
    data: int = 0

    @property
    def samples(self) -> int:
        """The number of samples the mean is over."""
        return len(self.positions)

    @property
    def seen(self) -> int:
        """The number of samples of the data that were run, dropped ones too."""
        return len(self.positions) + len(self.dropped)

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for rule in self.rules.values():
            counts[rule] = counts.get(rule, 0) + 1
        lines = [
            f"Fisher, {self.mode}, of {self.samples} samples",
            f"loss of a sample: {self.loss}",
            "parameters: " + ", ".join(f"{count} {rule}" for rule, count in sorted(counts.items())),
        ]
        if "autocast" in self.settings:
            lines.append(f"run under autocast in {self.settings['autocast']}")
        if self.dropped:
            lines.append(f"dropped as not finite: {len(self.dropped)} samples, at {few(self.dropped)}")
        lines += [f"no rule for {name} ({reason})" for name, reason in self.fallback.items()]
        if self.fallback:
            lines.append(f"what has no rule: {self.way or _UNREACHED}")
        lines += [f"tied: {name} = {', '.join(others)}" for name, others in self.aliases.items()]
        return "\n".join(lines)


class FisherScores(dict[str, Tensor]):
    """Parameter name -> fp32 scores of its shape, `(1/N) sum_n (d loss_n / d theta)^2`, and how they were made.

    Unit: (loss of one sample / parameter)^2, a mean over samples; what the loss of a sample is, the report says. With
    token_reduction "token" it is (loss of one token / parameter)^2, summed over the tokens of a sample. A tied
    parameter is there once, under its first name.
    """

    def __init__(self, scores: dict[str, Tensor], report: FisherReport) -> None:
        super().__init__(scores)
        self.report = report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write scores and report to a safetensors file, whole or not at all.

        Raises:
            OSError: the file could not be written; what was at `path` is untouched.
        """
        files.save(path, KIND, dict(self), _packed(self.report))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FisherScores:
        """Read what `save` wrote, onto the CPU, in the order of the model's parameters.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a file of Fisher scores, or is damaged.
        """
        scores, header = files.load(path, KIND)
        return cls(in_order(scores, header), _unpacked(header))


def in_order(held: Mapping[str, _T], header: Mapping[str, Any]) -> dict[str, _T]:
    """Return what a file of scores holds in the order of the model's parameters, which decides between ties.

    Files of tensors have an order of their own; the report's rules were written in that of the model.
    """
    known = [name for name in header["rules"] if name in held]
    return {name: held[name] for name in dict.fromkeys([*known, *held])}


def warn_of_fallback(report: FisherReport, scored: int, stacklevel: int) -> None:
    """Warn, once for all of them, of parameters that no rule serves; scored: how many there are in all."""
    if fallback := report.fallback:
        shown = [f"{name} ({reason})" for name, reason in list(fallback.items())[:_SHOWN]]
        how = report.way or _UNREACHED
        warnings.warn(
            f"{len(fallback)} of {scored} parameters take the slow path, {how}: {', '.join(shown)}"
            f"{', ...' if len(fallback) > _SHOWN else ''}; they are as exact as the others; leave them out "
            "(`names`, or `exclude` of select) if that takes too long; the report, or the mask's info, has all as "
            "`fallback`",
            stacklevel=stacklevel,
        )


def few(positions: list[int]) -> str:
    """Return the first of a list of positions, in words."""
    shown = ", ".join(str(position) for position in positions[:10])
    return shown + (", ..." if len(positions) > 10 else "")


def _packed(report: FisherReport) -> dict[str, Any]:
    # a million positions are a few runs
    runs: list[list[int]] = []
    for position in report.positions:
        if runs and position == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([position, position + 1])
    return {**asdict(report), "positions": runs}


def _unpacked(header: dict[str, Any]) -> FisherReport:
    positions = [position for start, stop in header["positions"] for position in range(start, stop)]
    return FisherReport(**{**header, "positions": positions})
