"""What the papers leave open, as options: each unknown of the published algorithm has a name and a default here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from sparseft.fisher.loss import Loss, Mode, Objective, Reduction
from sparseft.fisher.sample_dim import SampleDim
from sparseft.mask import Mask
from sparseft.selection.arguments import check_count

Order = Literal["samples_first", "params_first", "joint", "branch", "grid"]
Restrict = Literal["nested", "global"]
SampleScore = Literal["selected", "all"]
SelectBy = Literal["evaluator", "fisher_mass", "ladder"]
Reverse = Literal["no", "samples", "parameters", "both"]
Evaluator = Callable[[Mask], float]


@dataclass(frozen=True)
class Options:
    """How to search.

    Attributes:
        samples: N0, how many samples to start from: the first of the data, which should be shuffled.
        min_samples: where halving the samples ends.
        min_density: where halving the entries ends; by default an eighth of the density asked. Equal to it, only the
            samples are halved.
        order: what a round halves. "joint": samples and entries at once. "samples_first": the samples, then the
            entries, re-ranked on the samples kept. "params_first": the entries, then the samples. "branch": all three
            are looked at, and the round moves to the best. "grid": no rounds; every number of samples with every
            number of entries.
        rescore: rank samples by the entries kept and entries by the samples kept. If not, by the scores of the start:
            sets are then cut from two fixed rankings.
        restrict: "nested": entries are chosen among those kept so far, so that one pass over the samples serves the
            whole search. "global": among all selectable entries, which takes a Fisher pass over the samples kept, and
            two that score them, for every cell.
        sample_score: a sample's score is the sum of its squared gradients over the entries kept ("selected"), or over
            all selectable entries ("all"), for which every sample is run by itself once.
        select_by: what is best. "evaluator": the figure of an evaluator. "fisher_mass": the end of the path, each
            round of order "branch" moving to where most Fisher mass is kept. "ladder": the end of the path.
        evaluator: mask -> finite figure, higher is better; by default the loss on samples of the data that are held
            out, after a short training with the mask (see `trial`). One of your own must leave the model as it found
            it, and must not look at the data that the final result is reported on: the search would have trained on
            them.
        held_out: share of the samples read that the default evaluator measures on, and nothing else looks at.
        trial_steps: steps of its training.
        trial_lr: learning rate of its training.
        patience: rounds without a better figure after which the search ends.
        reverse: the control that should do worse: keep the lowest half of the "samples", the "parameters" or "both".
        class_balance: keep the same share of every class (of integer labels). Scores alone may lean to one:
            docs/methods.md says where they do.
        length_normalisation: divide a sample's score by its number of tokens (its attention mask's sum), for losses
            that are sums over tokens. Where a text has one label, as in RTE and SST-2, scores hardly depend on length,
            and this keeps texts of half to two thirds of the mean length.
        influence_cap: scale a sample's squared gradients down to this many times those of the median sample; None for
            no cap. The gradient of cross-entropy is the larger the less likely the label seems to the model, so to a
            model that knows the task the highest Fisher often belongs to a wrong label. A cap keeps a few such samples
            from choosing the entries; it does not remove them. Capped samples have one score
            at the entries of the start, where they tie (but for sample_score "all"), and the first of the data stay;
            a cap above 1 still puts them before all others. `mask.info["capped"]` has their positions.
        memory_limit: bytes that the samples' gradients at the candidate entries may take, N0 * k * 4. Above, they are
            computed again for every cell, and a warning says so.
        mode: as for `estimate_fisher`, and so are the next five.
        loss: of the caller's own.
        token_reduction: of a token-level loss.
        label_smoothing: of a cross-entropy.
        batch_dim: the dimension that counts samples.
        max_dropped: share of samples without finite gradient that is tolerated.
    """

    samples: int = 128
    min_samples: int = 8
    min_density: float | None = None
    order: Order = "joint"
    rescore: bool = True
    restrict: Restrict = "nested"
    sample_score: SampleScore = "selected"
    select_by: SelectBy = "evaluator"
    evaluator: Evaluator | None = None
    held_out: float = 0.25
    trial_steps: int = 16
    trial_lr: float = 3e-3
    patience: int = 2
    reverse: Reverse = "no"
    class_balance: bool = False
    length_normalisation: bool = False
    influence_cap: float | None = None
    memory_limit: int = 2 << 30
    mode: Mode = "empirical"
    loss: Loss | None = None
    token_reduction: Reduction = "mean"
    label_smoothing: float = 0.0
    batch_dim: int | Mapping[str, int] | None = None
    max_dropped: float = 0.05

    def __post_init__(self) -> None:
        choices = {
            "order": Order,
            "restrict": Restrict,
            "sample_score": SampleScore,
            "select_by": SelectBy,
            "reverse": Reverse,
        }
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        for name in ("samples", "min_samples", "trial_steps", "patience"):
            check_count(name, getattr(self, name))
        if self.memory_limit < 0:
            raise ValueError(f"memory_limit must be a number of bytes, got {self.memory_limit}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be a share in (0, 1), got {self.held_out}")
        for name in ("trial_lr", "influence_cap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.order == "branch" and self.select_by == "ladder":
            raise ValueError("order 'branch' needs something to choose by, got select_by='ladder'; use order='joint'")
        if self.evaluator is not None and self.select_by != "evaluator":
            raise ValueError(f"an evaluator goes with select_by='evaluator', got {self.select_by!r}")
        if self.restrict == "global" and self.reverse in ("parameters", "both"):
            raise ValueError(
                "the lowest of all entries are those that no sample reaches: reversed parameters need "
                "restrict='nested'"
            )

    def objective(self, seed: int) -> tuple[Objective, SampleDim]:
        """Return what is differentiated, and where the samples are."""
        turned = SampleDim(self.batch_dim)
        objective = Objective(
            self.mode, self.loss, self.token_reduction, seed, label_smoothing=self.label_smoothing, samples=turned
        )
        return objective, turned

    def changed(self) -> dict[str, Any]:
        """Return the options that are not the defaults, as plain JSON values."""
        every = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        plain = (bool, int, float, str, dict)
        return {
            name: value if isinstance(value, plain) else "given by the caller"
            for name, (value, default) in every.items()
            if value != default
        }
