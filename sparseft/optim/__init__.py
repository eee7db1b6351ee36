"""Drop-in optimizers that read and write selected entries only.

There is no Adafactor. What it saves is the second moment of a whole matrix, kept as a mean for each row and column; of
selected entries that is one byte each with `state_bits=8`. And at half a percent of a matrix most rows and columns
have a handful of entries or none, so that a product of their means says little about any of them.
"""

from sparseft.optim.adamw import SparseAdamW
from sparseft.optim.in_backward import step_in_backward
from sparseft.optim.lion import SparseLion
from sparseft.optim.options import SharedOptions
from sparseft.optim.sgd import SparseSGD

OPTIMIZERS = {"adamw": SparseAdamW, "lion": SparseLion, "sgd": SparseSGD}

__all__ = ["OPTIMIZERS", "SharedOptions", "SparseAdamW", "SparseLion", "SparseSGD", "step_in_backward"]
