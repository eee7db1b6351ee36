"""base + delta = fine-tuned, and back, bit for bit."""

import copy
import os

import pytest
import torch

import sparseft
import sparseft.testing
from sparseft import files
from sparseft.mask import fingerprint


def base_model(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(60, 40), torch.nn.Tanh(), torch.nn.Linear(40, 5)).to(device, dtype)


def fine_tuned(base, **options):
    model = copy.deepcopy(base)
    mask = sparseft.select("random", model, density=0.05, **options)
    optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 60).to(next(model.parameters()))).square().sum().backward()
        optimizer.step()
    return model, mask


@pytest.mark.parametrize("device", sparseft.testing.devices())
@pytest.mark.parametrize("dtype", sparseft.testing.DTYPES)
@pytest.mark.parametrize("dense", [(), "2.*"])
def test_base_plus_delta_is_the_fine_tuned_model_and_back(tmp_path, dtype, dense, device):
    base = base_model(dtype, device)
    original = fingerprint(base)
    model, mask = fine_tuned(base, dense=dense)
    sparseft.save_delta(model, mask, tmp_path / "delta.safetensors")
    applied = sparseft.load_delta(base, tmp_path / "delta.safetensors")
    assert fingerprint(base) == fingerprint(model) != original
    applied.restore()
    assert fingerprint(base) == original
    applied.restore()
    assert fingerprint(base) == original
    with applied:
        assert fingerprint(base) == fingerprint(model)
    assert fingerprint(base) == original


def test_the_delta_comes_out_when_an_exception_leaves(tmp_path):
    base = base_model()
    original = fingerprint(base)
    model, mask = fine_tuned(base)
    sparseft.save_delta(model, mask, tmp_path / "delta")
    with pytest.raises(KeyError), sparseft.load_delta(base, tmp_path / "delta"):
        raise KeyError
    assert fingerprint(base) == original


def test_one_delta_serves_many_models(tmp_path):
    base = base_model()
    model, mask = fine_tuned(base)
    sparseft.save_delta(model, mask, tmp_path / "delta")
    delta = sparseft.Delta.load(tmp_path / "delta")
    first, second = copy.deepcopy(base), copy.deepcopy(base)
    delta.apply(first)
    delta.apply(second)
    assert fingerprint(first) == fingerprint(second) == fingerprint(model)


def test_info_travels_with_the_delta(tmp_path):
    base = base_model()
    model, mask = fine_tuned(base)
    sparseft.save_delta(model, mask, tmp_path / "delta", info={"task": "mine"})
    info = sparseft.load_delta(base, tmp_path / "delta").info
    assert info["task"] == "mine"
    assert info["method"] == "random"
    assert info["seed"] == 0


def test_the_file_is_at_most_eight_bytes_an_entry_and_64_kib(tmp_path):
    base = torch.nn.Sequential(*[torch.nn.Linear(500, 500) for _ in range(12)])
    mask = sparseft.select("random", base, density=0.005)
    sparseft.save_delta(base, mask, tmp_path / "delta")
    assert os.path.getsize(tmp_path / "delta") <= 8 * mask.k + 64 * 1024
    assert os.path.getsize(tmp_path / "delta") <= 6.5 * mask.k + 16 * 1024


def test_a_delta_of_another_model_is_refused_and_nothing_changes(tmp_path):
    base = base_model()
    model, mask = fine_tuned(base, dense="2.bias")
    path = tmp_path / "delta"
    sparseft.save_delta(model, mask, path)

    def refuse(other, match):
        before = fingerprint(other)
        with pytest.raises(ValueError, match=match):
            sparseft.load_delta(other, path)
        assert fingerprint(other) == before

    other = base_model()
    with torch.no_grad():
        other[0].weight[3, 3] += 1e-7
    refuse(other, r"base weights differ in 1 of 3 parameters: \[0.weight\]")
    refuse(model, "base weights differ")
    refuse(base_model(torch.bfloat16), "bfloat16 in the model and torch.float32 in the delta")
    refuse(torch.nn.Sequential(torch.nn.Linear(60, 41), torch.nn.Tanh(), torch.nn.Linear(41, 5)), r"\[41, 60\], not")
    refuse(torch.nn.Linear(60, 40), "missing parameters")


def test_a_new_head_need_not_match(tmp_path):
    """The dense head is replaced whole, so the base may come with any head."""
    base = base_model()
    model, mask = fine_tuned(base, dense="2.*")
    sparseft.save_delta(model, mask, tmp_path / "delta")
    torch.nn.init.normal_(base[2].weight)
    sparseft.load_delta(base, tmp_path / "delta")
    assert fingerprint(base) == fingerprint(model)


def test_damaged_files_are_refused(tmp_path):
    base = base_model()
    model, mask = fine_tuned(base)
    path = tmp_path / "delta"
    sparseft.save_delta(model, mask, path)
    whole = path.read_bytes()
    for damage in (whole[:-1], whole[: len(whole) // 2], b"", whole[:5], b"\xff" * 200):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="not a readable delta"):
            sparseft.Delta.load(path)
    path.write_bytes(whole)
    tensors, header = files.load(path, "delta")
    tensors["values.0.weight"] = tensors["values.0.weight"][:-1]
    files.save(path, "delta", tensors, header)
    with pytest.raises(ValueError, match=r"differ in length for \['0.weight'\]"):
        sparseft.Delta.load(path)


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    base = base_model()
    model, mask = fine_tuned(base)
    path = tmp_path / "delta"
    sparseft.save_delta(model, mask, path)
    whole = path.read_bytes()
    before = fingerprint(base)
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged|not a readable delta|must be a 'sparseft delta 1' file"):
            sparseft.load_delta(base, path)
    assert fingerprint(base) == before


def test_a_folder_that_is_not_there_is_named(tmp_path):
    model, mask = fine_tuned(base_model())
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; make it first"):
        sparseft.save_delta(model, mask, tmp_path / "nowhere" / "delta")


def test_a_pickle_is_never_opened(tmp_path):
    """A file that would run code when unpickled is refused as unreadable."""
    path, proof = tmp_path / "delta", tmp_path / "proof"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(proof),)

    torch.save({"delta": Bomb()}, path)
    with pytest.raises(ValueError, match="not a readable delta"):
        sparseft.load_delta(base_model(), path)
    assert not proof.exists()


def test_saving_for_the_wrong_mask_is_refused(tmp_path):
    _, mask = fine_tuned(base_model())
    with pytest.raises(ValueError, match="another model"):
        sparseft.save_delta(torch.nn.Linear(3, 3), mask, tmp_path / "delta")
    with pytest.raises(TypeError, match=r"mask must be a sparseft\.Mask, got Linear"):
        sparseft.save_delta(mask, torch.nn.Linear(3, 3), tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_backward_after_a_swap_is_an_error():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))
    mask = sparseft.select("random", model, density=0.3)
    values = {name: model.get_parameter(name).detach().view(-1)[index.long()] + 1 for name, index in mask.items()}
    loss = model(torch.randn(3, 6)).sum()
    sparseft.Delta(mask, values, {}).apply(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_changed_outside_of_the_mask_is_not_left_out_in_silence(tmp_path):
    model = base_model()
    mask = sparseft.select("random", model, density=0.1, include="0.weight", progress=False)
    path = tmp_path / "delta.safetensors"
    with torch.no_grad():
        model[2].bias += 1
    rest = sparseft.select("random", model, density=0.1, include="0.weight", progress=False)
    with pytest.raises(ValueError, match=r"1 parameters changed outside of the mask, 2.bias the first"):
        sparseft.save_delta(model, mask, path)
    assert not path.exists()
    sparseft.save_delta(model, mask, path, check_weights=False)
    sparseft.save_delta(model, rest, path)


def train(model, optimizer):
    model(torch.randn(8, 60)).square().sum().backward()
    optimizer.step()


def another_mask(model, mask):
    optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=0.01)
    optimizer.set_mask(sparseft.select("random", model, density=0.05, seed=1), model)
    train(model, optimizer)


def a_schedule(model, mask):
    optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=0.01)
    with sparseft.schedules.DropGrow(model, optimizer, mask, every=1):
        train(model, optimizer)
        train(model, optimizer)


def an_optimizer_that_knows_no_masks(model, mask):
    train(model, torch.optim.AdamW(mask.param_groups(model), lr=0.01))


def other_weights(model, mask):
    with torch.no_grad():
        model[0].weight[0] += 1


@pytest.mark.parametrize("way", [another_mask, a_schedule, an_optimizer_that_knows_no_masks, other_weights])
@pytest.mark.parametrize("saved", [False, True])
def test_what_changed_beside_selected_entries_is_found(tmp_path, way, saved):
    """Also by a mask that was in a file."""
    model, path = base_model(), tmp_path / "delta"
    mask = sparseft.select("random", model, density=0.05)
    if saved:
        mask.save(tmp_path / "mask")
        mask = sparseft.Mask.load(tmp_path / "mask")
    way(model, mask)
    with pytest.raises(ValueError, match=r"parameters changed outside of the mask, 0.weight the first"):
        sparseft.save_delta(model, mask, path)
    assert not path.exists()


def moved(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def there_and_back(model):
    model.double().float()


@pytest.mark.parametrize("change", [moved, there_and_back])
@pytest.mark.parametrize("dense", [(), "2.*"])
def test_a_delta_follows_a_model_that_was_given_other_memory(change, dense):
    base = base_model()
    original = fingerprint(base)
    model, mask = fine_tuned(base, dense=dense)
    applied = sparseft.Delta.of(model, mask).apply(base)
    change(base)
    assert fingerprint(base) == fingerprint(model)
    applied.restore()
    assert fingerprint(base) == original
    change(base)
    applied.swap()
    assert fingerprint(base) == fingerprint(model)


def test_a_delta_does_not_follow_into_another_dtype():
    base = base_model()
    model, mask = fine_tuned(base, dense="2.bias")
    applied = sparseft.Delta.of(model, mask).apply(base)
    base.bfloat16()
    before = fingerprint(base)
    with pytest.raises(ValueError, match=r"0.weight is torch.bfloat16 in the model and torch.float32 in the delta"):
        applied.restore()
    assert applied.active
    assert fingerprint(base) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", sparseft.testing.DTYPES)
@pytest.mark.parametrize("name", ["0.weight", "2.bias"], ids=["selected", "dense"])
def test_values_that_are_not_finite_are_refused(tmp_path, bad, dtype, name):
    model = base_model(dtype)
    mask = sparseft.select("random", model, density=0.1, dense="2.bias")
    place = int(mask[name][3]) if name in mask else 3
    with torch.no_grad():
        model.get_parameter(name).view(-1)[place] = bad
    with pytest.raises(ValueError, match=rf"must be finite, got 1 of [\d,]+ NaN or infinite in {name}; training div"):
        sparseft.save_delta(model, mask, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
