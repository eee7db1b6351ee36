"""Fine-tune a pretrained model by changing 0.01-10 % of its weights in place.

mask = sparseft.select("fish", model, train_loader, density=0.005)
optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=3e-3)
...
sparseft.save_delta(model, mask, "delta.safetensors")
"""

import importlib.metadata

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
    "estimate_fisher",
    "ird_search",
    "load_delta",
    "sample_gradients",
    "save_delta",
    "select",
    "step_in_backward",
    "top_k",
]
