"""Two processes over gloo: DDP averages the leaves' gradients, and sends nothing else."""

import contextlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparseft

WORKER = Path(__file__).with_name("ddp_worker.py")


def worker_module():
    spec = importlib.util.spec_from_file_location("ddp_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_equal_one(tmp_path):
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, WORKER, str(rank), tmp_path / "store", file], stderr=subprocess.PIPE)
        for rank, file in enumerate(files)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    found = [torch.load(file) for file in files]

    worker = worker_module()
    model = worker.net()
    mask = worker.mask_of(model)
    with sparseft.compact_gradients(model, mask):
        grads = worker.train(model, mask, model, slice(None), lambda last: contextlib.nullcontext())
    for each in found:
        assert sum(each["sent"]) == 2 * mask.trained  # once a step, not once a micro-batch
        assert each["grads"].keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(each["grads"][name], grad)
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(each["weights"][name], weight, rtol=1e-4, atol=1e-5)
            assert torch.equal(each["weights"][name], found[0]["weights"][name])
