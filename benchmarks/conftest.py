"""Shared by every benchmark: a clean import path, the comparison fixture, and what a run is stamped with."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# The repository's root holds a folder named `kernels`, which would shadow the package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE.parent]
sys.path.insert(0, str(HERE))

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import harness  # noqa: E402


@pytest.fixture
def compare(benchmark):
    """Time an implementation against its baselines; see `harness.compare`."""

    def run(case, ours, baselines, **options):
        harness.compare(benchmark, case, ours, baselines, **options)

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["sparseft"] = harness.machine()
