"""Exact per-sample Fisher information, for every parameter, in one backward pass a batch."""

from sparseft.fisher.columns import SampleGradients, sample_gradients
from sparseft.fisher.engine import estimate_fisher
from sparseft.fisher.loop import batch_one_fisher
from sparseft.fisher.report import FisherReport, FisherScores
from sparseft.fisher.verify import verify

__all__ = [
    "FisherReport",
    "FisherScores",
    "SampleGradients",
    "batch_one_fisher",
    "estimate_fisher",
    "sample_gradients",
    "verify",
]
