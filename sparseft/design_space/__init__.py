"""PEFT design spaces: which layers train, with how many weights, and how. Source: arXiv 2301.01821.

space = Space(("AS", "LS", "LS", "S"), grouping="spindle", allocation="uniform")
space.save("space.json")
Space.preset("s4")                          # what the paper found
"""

from sparseft.design_space.layers import Layer, find_layers
from sparseft.design_space.path import Choice, SearchPath
from sparseft.design_space.plan import GroupPlan, Part, Plan, plan
from sparseft.design_space.search import Options, search
from sparseft.design_space.sizes import ALLOCATIONS, GROUPINGS, allocate, group_sizes
from sparseft.design_space.space import PRESETS, STRATEGIES, Space

__all__ = [
    "ALLOCATIONS",
    "GROUPINGS",
    "Choice",
    "GroupPlan",
    "Options",
    "PRESETS",
    "Part",
    "Plan",
    "STRATEGIES",
    "Layer",
    "SearchPath",
    "Space",
    "allocate",
    "find_layers",
    "group_sizes",
    "plan",
    "search",
]
