"""What is freed during a pass on the CPU stays with the process until the pass ends."""

import contextlib
import subprocess
import sys

import pytest
import torch

from sparseft.fisher import heap, state

HEAP = """
import ctypes
from sparseft.fisher import heap

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

def take_and_free():
    blocks = [libc.malloc(1_000_000) for _ in range(200)]
    for block in blocks:
        libc.memset(block, 1, 1_000_000)
    for block in blocks:
        libc.free(block)

assert heap._mallopt() is not None
before = resident()
with heap.kept_heap():
    take_and_free()
    kept = resident() - before
take_and_free()
print(kept, resident() - before)
"""


@pytest.mark.skipif(heap._mallopt() is None, reason="the heap is not glibc's, or somebody chose how it behaves")
def test_what_is_freed_is_kept_for_a_pass_and_given_back_afterwards():
    run = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True)
    kept, left = map(int, run.stdout.split())
    assert kept > 190_000_000
    assert left < 100_000_000


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "1000000"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000")]
)
def test_a_heap_that_somebody_set_is_left_alone(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert heap._mallopt() is None


def test_the_heap_is_kept_for_models_on_the_cpu_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(heap, "_mallopt", lambda: lambda option, value: calls.append((option, value)))
    model = torch.nn.Linear(2, 2)
    with contextlib.suppress(KeyboardInterrupt), state.evaluation(model, {}):
        assert calls[-1] == (-1, 2**31 - 1)
        raise KeyboardInterrupt
    assert calls[-1] == (-1, 2**26)
    calls.clear()
    with state.evaluation(model.to("meta"), {}):
        assert calls == []
