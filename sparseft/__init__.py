"""Fine-tune a pretrained model by changing 0.01-10 % of its weights in place.

mask = sparseft.select("fish", model, train_loader, density=0.005)
optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=3e-3)
...
sparseft.save_delta(model, mask, "delta.safetensors")
"""

import importlib
import importlib.metadata
from typing import Any

from sparseft.compact import CompactGradients, compact_gradients
from sparseft.delta import AppliedDelta, Delta, load_delta, save_delta
from sparseft.fisher import FisherScores, estimate_fisher, sample_gradients
from sparseft.mask import Mask
from sparseft.optim import SparseAdamW, SparseLion, SparseSGD, step_in_backward
from sparseft.selection import IRDPath, ird_search, select, top_k

__version__ = importlib.metadata.version("sparseft")

__all__ = [
    "AppliedDelta",
    "CompactGradients",
    "Delta",
    "FisherScores",
    "IRDPath",
    "Mask",
    "SparseAdamW",
    "SparseLion",
    "SparseSGD",
    "compact_gradients",
    "data",
    "design_space",
    "estimate_fisher",
    "ird_search",
    "load_delta",
    "sample_gradients",
    "save_delta",
    "schedules",
    "select",
    "step_in_backward",
    "top_k",
    "workers",
]

_ROOMS = ("data", "design_space", "schedules", "workers")  # imported when asked for: not every start needs them


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"sparseft.{name}")
    raise AttributeError(f"module 'sparseft' has no attribute {name!r}")
