"""Which samples to train on: DELIFT's subsets, by how much samples help each other. Source: arXiv 2411.04425."""

from sparseft.data.chosen import ChosenSamples, Reason
from sparseft.data.greedy import Greedy, lazy_greedy, plain_greedy
from sparseft.data.kernels import embedding_kernel, fisher_kernel
from sparseft.data.objectives import (
    ConditionalGain,
    FacilityLocation,
    PoolMutualInformation,
    QueryMutualInformation,
    nonnegative,
)
from sparseft.data.prompts import Prompts, Sample
from sparseft.data.stages import continual, instruction_tuning, task_specific
from sparseft.data.utility import utility_kernel

__all__ = [
    "ChosenSamples",
    "ConditionalGain",
    "FacilityLocation",
    "Greedy",
    "PoolMutualInformation",
    "Prompts",
    "QueryMutualInformation",
    "Reason",
    "Sample",
    "continual",
    "embedding_kernel",
    "fisher_kernel",
    "instruction_tuning",
    "lazy_greedy",
    "nonnegative",
    "plain_greedy",
    "task_specific",
    "utility_kernel",
]
