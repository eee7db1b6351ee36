"""Shared by every test. `tests/` has no __init__.py on purpose: see the guard below."""

import os
import sys
from pathlib import Path

# The repository's root holds a folder named `kernels`; with the root on sys.path it would shadow the package of that
# name, which transformers imports.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated, so before sparseft.kernels loads
