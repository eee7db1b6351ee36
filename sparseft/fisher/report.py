"""What comes out of a pass: the scores, and how they were made."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class FisherReport:
    """How a Fisher estimate was made.

    Attributes:
        mode: "empirical", "expected" or "sampled".
        loss: the loss of one sample, in words; the unit of the scores is (this / parameter)^2.
        positions: where the samples used stand in the data.
        dropped: where the samples stand that had a non-finite loss or gradient; they count nowhere.
        rules: parameter name -> the rules that served it: "linear", "bias", "embedding", "norm", "elementwise",
            "fallback" (autograd, one sample at a time), or "unused" (the loss does not depend on it).
        fallback: parameter name -> why no rule could serve it.
        aliases: name of a tied parameter -> its other names.
    """

    mode: str
    loss: str = ""
    positions: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    rules: dict[str, str] = field(default_factory=dict)
    fallback: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """The number of samples the mean is over."""
        return len(self.positions)

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for rule in self.rules.values():
            counts[rule] = counts.get(rule, 0) + 1
        lines = [
            f"Fisher, {self.mode}, of {self.samples} samples",
            f"loss of a sample: {self.loss}",
            "parameters: " + ", ".join(f"{count} {rule}" for rule, count in sorted(counts.items())),
        ]
        if self.dropped:
            lines.append(f"dropped as not finite: {len(self.dropped)} samples, at {_few(self.dropped)}")
        lines += [f"one sample at a time: {name} ({reason})" for name, reason in self.fallback.items()]
        lines += [f"tied: {name} = {', '.join(others)}" for name, others in self.aliases.items()]
        return "\n".join(lines)


class FisherScores(dict[str, Tensor]):
    """Parameter name -> fp32 scores of its shape, `(1/N) sum_n (d loss_n / d theta)^2`, and how they were made.

    Unit: (loss of one sample / parameter)^2. A tied parameter is there once, under its first name.
    """

    def __init__(self, scores: dict[str, Tensor], report: FisherReport) -> None:
        super().__init__(scores)
        self.report = report


def _few(positions: list[int]) -> str:
    shown = ", ".join(str(position) for position in positions[:10])
    return shown + (", ..." if len(positions) > 10 else "")
