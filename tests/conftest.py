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

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated, so before sparseft.kernels loads


@pytest.fixture
def generator():
    """Random numbers that are the same in every run."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=[1, 3], ids=lambda threads: f"{threads} threads")
def threads(request):
    """Run on so many threads, one after the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
