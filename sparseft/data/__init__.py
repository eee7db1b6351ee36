"""Which samples to train on: DELIFT's subsets, by how much samples help each other. Source: arXiv 2411.04425."""

from sparseft.data.greedy import Greedy, lazy_greedy, plain_greedy
from sparseft.data.objectives import (
    ConditionalGain,
    FacilityLocation,
    PoolMutualInformation,
    QueryMutualInformation,
    nonnegative,
)

__all__ = [
    "ConditionalGain",
    "FacilityLocation",
    "Greedy",
    "PoolMutualInformation",
    "QueryMutualInformation",
    "lazy_greedy",
    "nonnegative",
    "plain_greedy",
]
