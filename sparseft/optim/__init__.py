"""Drop-in optimizers that read and write selected entries only."""

from sparseft.optim.adamw import SparseAdamW
from sparseft.optim.sgd import SparseSGD

OPTIMIZERS = {"adamw": SparseAdamW, "sgd": SparseSGD}

__all__ = ["OPTIMIZERS", "SparseAdamW", "SparseSGD"]
