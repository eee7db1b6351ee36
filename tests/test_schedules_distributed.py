"""Two processes over gloo: schedules choose, draw and train alike in both, and as one process does."""

import subprocess
import sys

import ddp_schedules_worker as worker
import pytest
import torch


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process came to."""
    folder = tmp_path_factory.mktemp("ddp")
    files = [folder / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, worker.__file__, str(rank), folder / "store", file], stderr=subprocess.PIPE)
        for rank, file in enumerate(files)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return [torch.load(file) for file in files]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", worker.MAKE)
def test_two_processes_agree_and_equal_one(found, name):
    one, other = (each[name] for each in found)
    assert one["counts"] == other["counts"] == (worker.STEPS - 1, 1)
    for step, (mine, its) in enumerate(zip(one["masks"], other["masks"], strict=True)):
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[key], its[key]) for key in mine), step
    for key, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][key]), key
    alone = worker.train(name, lambda model: model, slice(None), True)
    for key, weight in one["weights"].items():
        torch.testing.assert_close(weight, alone["weights"][key], rtol=1e-3, atol=1e-4, msg=key)
    for mine, its in zip(one["masks"], alone["masks"], strict=True):
        # the order of sums differs, and may decide between two entries
        same = sum(int(torch.isin(mine[key], its[key]).sum()) for key in mine)
        assert same >= 0.98 * sum(index.numel() for index in its.values())
