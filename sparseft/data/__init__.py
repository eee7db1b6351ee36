"""Which samples to train on: DELIFT's subsets, by how much samples help each other. Source: arXiv 2411.04425."""

from sparseft.data.greedy import Greedy, lazy_greedy, plain_greedy
from sparseft.data.objectives import (
    ConditionalGain,
    FacilityLocation,
    PoolMutualInformation,
    QueryMutualInformation,
    nonnegative,
)
from sparseft.data.prompts import Prompts, Sample
from sparseft.data.utility import utility_kernel

__all__ = [
    "ConditionalGain",
    "FacilityLocation",
    "Greedy",
    "PoolMutualInformation",
    "Prompts",
    "QueryMutualInformation",
    "Sample",
    "lazy_greedy",
    "nonnegative",
    "plain_greedy",
    "utility_kernel",
]
