"""Drop-in optimizers that read and write selected entries only."""

from sparseft.optim.adamw import SparseAdamW
from sparseft.optim.in_backward import step_in_backward
from sparseft.optim.lion import SparseLion
from sparseft.optim.sgd import SparseSGD

OPTIMIZERS = {"adamw": SparseAdamW, "lion": SparseLion, "sgd": SparseSGD}

__all__ = ["OPTIMIZERS", "SparseAdamW", "SparseLion", "SparseSGD", "step_in_backward"]
