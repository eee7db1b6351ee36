"""Two processes over gloo: each sends its values, and both have the same weights afterwards, bit for bit."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparseft

WORKER = Path(__file__).with_name("exchange_worker.py")

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("exchange_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what each of the two processes wrote."""
    folder = tmp_path_factory.mktemp("exchange")
    results = [folder / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, WORKER, str(rank), folder / "store", result], stderr=subprocess.PIPE)
        for rank, result in enumerate(results)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return [torch.load(result) for result in results]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def put_together(base, models, masks, shares):
    """Write every worker's entries over the base's, and the mean of dense parameters."""
    result = {name: value.clone() for name, value in base.state_dict().items()}
    for model, mask in zip(models, masks, strict=True):
        own = dict(model.named_parameters())
        for name, index in mask.items():
            for place in index.tolist():
                result[name].view(-1)[place] = own[name].detach().view(-1)[place]
    for name in masks[0].dense:
        wholes = [model.get_parameter(name).detach().double() for model in models]
        mean = sum(share * whole for share, whole in zip(shares, wholes, strict=True)) / sum(shares)
        result[name].copy_(mean)
    return result


def assert_same_bits(weights, wanted):
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(weights[name], value), name


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("first", "dtype"), [(0, torch.float32), (2, torch.bfloat16)])
def test_both_have_the_weights_that_were_trained_apart(found, script, first, dtype):
    """Optimizers go on after an exchange, so the same two are kept here too."""
    models = [script.net(dtype) for _ in range(2)]
    masks = script.masks_of(models[0])
    optimizers = [
        sparseft.SparseAdamW(mask.param_groups(model), lr=0.05) for model, mask in zip(models, masks, strict=True)
    ]
    for round_, lr in script.ROUNDS:
        base = script.net(dtype)
        base.load_state_dict(models[0].state_dict())
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.param_groups[0]["lr"] = lr
            script.train(model, optimizer, rank, round_)
        wanted = put_together(base, models, masks, [1.0, 2.0])
        for model in models:
            model.load_state_dict(wanted)
        for each in found:
            assert_same_bits(each["rounds"][first + round_]["weights"], wanted)
            assert each["rounds"][first + round_]["k"] == 75


def test_k_values_and_the_dense_parameter_are_sent_and_nothing_else(found):
    for each in found:
        for place, itemsize in ((0, 4), (1, 4), (2, 2), (3, 2)):
            # a checksum; then the larger mask's 38 entries, and the head's bias of 3
            assert each["rounds"][place]["sent"] == [32, (38 + 3) * itemsize]


def test_compact_gradients_go_on_after_an_exchange(found):
    """Products differ in rounding, so the comparison is between the processes, and close to ordinary gradients."""
    ordinary = found[0]["rounds"][3]["weights"]
    for name, value in found[0]["compact"].items():
        assert torch.equal(value, found[1]["compact"][name])
        torch.testing.assert_close(value, ordinary[name], rtol=0.05, atol=0.02)


def test_several_dtypes_and_masks_of_unequal_sizes(found, script):
    base, models = script.several_dtypes(), [script.several_dtypes() for _ in range(2)]
    masks = script.uneven_masks(base)
    for rank, model in enumerate(models):
        script.change(model, masks[rank], rank)
    wanted = put_together(base, models, masks, [1.0, 1.0])
    sizes = [sum(len(index) * base[name].itemsize for name, index in mask.items()) + 2 for mask in masks]
    assert sizes[0] != sizes[1]
    for each in found:
        assert_same_bits(each["several dtypes"]["weights"], wanted)
        assert each["several dtypes"]["sent"] == [32, max(sizes)]


@pytest.mark.usefixtures("one_thread")
def test_one_mask_for_all_takes_the_mean(found, script):
    models = [script.net() for _ in range(2)]
    mask = script.masks_of(models[0])[0]
    same = sparseft.Mask(dict(mask), mask.shapes, fingerprint=mask.fingerprint)
    for rank, model in enumerate(models):
        script.train(model, sparseft.SparseAdamW(same.param_groups(model), lr=0.05), rank, 0)
    first, second = (model.state_dict() for model in models)
    wanted = {name: ((first[name].double() + second[name].double()) / 2).float() for name in first}
    for each in found:
        assert_same_bits(each["same mask"], wanted)


def test_what_does_not_go_together_is_refused_everywhere(found):
    """Which of the two is wrong is not known to the other, but both stop; models are as they were."""
    messages = {
        "other masks": ("same masks, options and dtypes, got others in process 1", "got others in process 0"),
        "too many masks": ("process 1 could not go on", "masks must be one a process, 2, got 3"),
        "other options": ("same masks, options and dtypes", "same masks, options and dtypes"),
        "overlap": ("must be disjoint", "must be disjoint"),
        "other dtypes": ("same masks, options and dtypes", "same masks, options and dtypes"),
        "another model": ("the mask is of another model", "process 0 could not go on"),
        "no masks": ("process 1 could not go on", "mask must be a sparseft.Mask, got str"),
        "no weights": ("could not convert string to float", "process 0 could not go on"),
        "others trained": ("trained weights outside of this mask", "process 0 could not go on"),
        "not finite": ("process 1 could not go on", "got 1 of 3 NaN or infinite in 3.bias"),
        "other weights": ("that no mask selects differ in process 1", "that no mask selects differ in process 0"),
    }
    for rank, each in enumerate(found):
        assert each["errors"].keys() == messages.keys()
        for what, message in messages.items():
            assert message[rank] in each["errors"][what], what
