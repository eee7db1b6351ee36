"""The mask's contract, its files, and what it refuses."""

import os

import pytest
import torch

import sparseft
from sparseft import files
from sparseft.mask import fingerprint


def small_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 50))
    model[2].weight = model[0].weight
    return model


def small_mask(model=None, **options):
    model = model or small_model()
    return sparseft.select("random", model, density=0.1, **options)


def test_counts_exactly_what_was_asked():
    model = small_model()
    total = sum(parameter.numel() for parameter in model.parameters())
    for density in (1 / total, 0.01, 0.1, 0.29, 0.999, 1.0):
        mask = sparseft.select("random", model, density=density)
        assert mask.k == max(1, int(density * total + 1e-9))
        assert mask.n == total
        assert mask.density == mask.k / mask.n
    assert sparseft.select("random", model, k=17).k == 17


def test_tied_parameters_appear_once_with_their_aliases():
    mask = small_mask()
    assert set(mask.shapes) == {"0.weight", "1.weight", "1.bias", "2.bias"}
    assert mask.aliases == {"2.weight": "0.weight"}


def test_index_lists_are_sorted_unique_int32():
    for name, index in small_mask().items():
        assert index.dtype == torch.int32
        assert torch.equal(index, index.unique()), name


def test_dense_parameters_stay_outside_the_budget():
    mask = small_mask(dense="2.bias")
    assert list(mask.dense) == ["2.bias"]
    assert "2.bias" not in mask.shapes
    assert mask.trained == mask.k + 50


def test_include_and_exclude_choose_by_name():
    assert set(small_mask(include="*weight").shapes) == {"0.weight", "1.weight"}
    assert set(small_mask(include=["*weight", "1.*"], exclude="0.*").shapes) == {"1.weight", "1.bias"}


def test_parameters_that_were_frozen_are_not_selected_from():
    model = small_model()
    model[1].weight.requires_grad_(False)
    assert "1.weight" not in small_mask(model).shapes


def test_a_mask_survives_its_file(tmp_path):
    mask = small_mask(dense="2.bias")
    mask.save(tmp_path / "mask.safetensors")
    again = sparseft.Mask.load(tmp_path / "mask.safetensors")
    assert again == mask
    assert (again.info, again.aliases, again.fingerprint) == (mask.info, mask.aliases, mask.fingerprint)
    assert again.info["method"] == "random"
    assert again.info["density_asked"] == 0.1
    assert all(index.dtype == torch.int32 for index in again.values())


def test_set_operations_agree_with_pythons_sets():
    model = small_model()
    first, second = (sparseft.select("random", model, density=0.3, seed=seed) for seed in (1, 2))

    def entries(mask):
        return {(name, int(i)) for name, index in mask.items() for i in index}

    assert entries(first.union(second)) == entries(first) | entries(second)
    assert entries(first.intersection(second)) == entries(first) & entries(second)
    assert first.overlap(second) == len(entries(first) & entries(second)) / first.k
    assert first.overlap(first) == 1.0


def test_param_groups_pair_parameters_with_their_lists():
    model = small_model()
    mask = small_mask(model, dense="2.bias")
    selected, dense = mask.param_groups(model)
    parameters = dict(model.named_parameters())
    assert all(a is parameters[name] for a, name in zip(selected["params"], mask, strict=True))
    assert all(a is mask.index_list(name) for a, name in zip(selected["indices"], mask, strict=True))
    assert dense["params"][0] is model[2].bias
    assert dense["indices"] is None


def test_freeze_rest_leaves_what_trains():
    model = small_model()
    sparseft.select("random", model, density=0.1, include="1.weight", dense="2.bias").freeze_rest(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["1.weight", "2.bias"]


def test_selection_leaves_the_model_as_it_was():
    model = small_model()
    before = fingerprint(model)
    small_mask(model)
    assert fingerprint(model) == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("gaps", [[0], [1, 2, 3], [65534], [65535], [65536, 65535, 1], [200000, 0 + 1, 131070], []])
def test_positions_survive_their_two_byte_code(gaps):
    positions = torch.tensor(gaps, dtype=torch.int64).cumsum(0)
    codes = files.encode_indices(positions.int())
    assert torch.equal(files.decode_indices(codes, 10**6).long(), positions)


def test_positions_beyond_two_to_the_31_survive():
    positions = torch.tensor([0, 2**31 - 1, 2**31, 3 * 2**31])
    decoded = files.decode_indices(files.encode_indices(positions), 4 * 2**31)
    assert decoded.dtype == torch.int64
    assert torch.equal(decoded, positions)


def test_an_index_list_takes_two_bytes_an_entry(tmp_path):
    model = torch.nn.Linear(2000, 1000)
    sparseft.select("random", model, density=0.005).save(tmp_path / "mask")
    assert os.path.getsize(tmp_path / "mask") <= 2.5 * 10_005 + 4096


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), None])
def test_density_out_of_range_is_refused(density):
    with pytest.raises(ValueError, match="density"):
        sparseft.select("random", small_model(), density=density)


def test_selection_names_what_is_wrong():
    model = small_model()
    with pytest.raises(ValueError, match=r"method must be one of random, magnitude, .*, fish, ird, got 'fihs'"):
        sparseft.select("fihs", model, density=0.1)
    with pytest.raises(ValueError, match=r"include pattern 'layer9\.\*' matches no parameter"):
        sparseft.select("random", model, density=0.1, include="layer9.*")
    with pytest.raises(ValueError, match="leave none over"):
        sparseft.select("random", model, density=0.1, exclude="*")
    with pytest.raises(ValueError, match="needs data"):
        sparseft.select("fish", model, density=0.1)
    with pytest.raises(TypeError, match="has no option sample; it has"):
        sparseft.select("fish", model, [], density=0.1, sample=3)
    with pytest.raises(ValueError, match="k must be at most"):
        sparseft.select("random", model, k=10**9)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        sparseft.select("random", model, density=0.1)


def test_scores_that_cannot_rank_are_refused():
    with pytest.raises(ValueError, match="every score is zero"):
        sparseft.top_k({"a": torch.zeros(10)}, 0.5)
    with pytest.raises((ValueError, RuntimeError), match="finite"):
        sparseft.top_k({"a": torch.tensor([1.0, float("nan")])}, 0.5)
    with pytest.raises(ValueError, match="nothing to select from"):
        sparseft.top_k({}, 0.5)
    with pytest.warns(UserWarning, match="score zero"):
        sparseft.top_k({"a": torch.tensor([1.0, 0.0, 0.0, 0.0])}, 0.5)


def test_scope_tensor_keeps_the_density_of_each_parameter():
    scores = {"a": torch.rand(100) + 10, "b": torch.rand(200)}
    assert {name: i.numel() for name, i in sparseft.top_k(scores, 0.1, scope="tensor").items()} == {"a": 10, "b": 20}
    assert {name: i.numel() for name, i in sparseft.top_k(scores, 0.1).items()} == {"a": 30}


def test_magnitude_takes_the_largest_weights():
    model = small_model()
    mask = sparseft.select("magnitude", model, k=40)
    chosen = torch.cat([dict(model.named_parameters())[name].detach().flatten()[i.long()] for name, i in mask.items()])
    every = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).abs()
    assert torch.equal(chosen.abs().sort().values, every.sort().values[-40:])


def test_another_model_is_refused_by_name_and_shape():
    mask = small_mask()
    with pytest.raises(ValueError, match=r"missing parameters \[0.weight, 1.weight, 1.bias, 2.bias\]"):
        mask.param_groups(torch.nn.Bilinear(2, 2, 2))
    other = small_model()
    other[1] = torch.nn.Linear(8, 9)
    with pytest.raises(ValueError, match=r"1.weight is \[9, 8\], not \[8, 8\]"):
        mask.param_groups(other)


def test_a_parameter_frozen_after_selection_is_refused():
    model = small_model()
    mask = small_mask(model)
    model[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen \[1.weight\].*unfreeze"):
        mask.param_groups(model)


@pytest.mark.parametrize("bad", [[3, 1], [1, 1], [-1, 2], [1, 10]])
def test_bad_index_lists_are_refused(bad):
    with pytest.raises(ValueError, match="indices of a must"):
        sparseft.Mask({"a": torch.tensor(bad)}, {"a": (10,)})


def test_files_that_are_no_masks_are_refused(tmp_path):
    mask, path = small_mask(), tmp_path / "mask.safetensors"
    with pytest.raises(FileNotFoundError):
        sparseft.Mask.load(path)
    mask.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="not a readable mask"):
        sparseft.Mask.load(path)
    path.write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ValueError, match="not a readable mask"):
        sparseft.Mask.load(path)
    files.save(path, "delta", {}, {})
    with pytest.raises(ValueError, match="must be a 'sparseft mask 1' file, got 'sparseft delta 1'"):
        sparseft.Mask.load(path)


def test_indices_that_a_file_makes_up_are_refused(tmp_path):
    mask, path = small_mask(), tmp_path / "mask.safetensors"
    codes = torch.tensor([60000, 60000], dtype=torch.uint16)
    files.save(path, "mask", {"indices.0.weight": codes}, mask.header())
    with pytest.raises(ValueError, match="below 400"):
        sparseft.Mask.load(path)
    files.save(path, "mask", {"indices.0.weight": codes.view(torch.int16)}, mask.header())
    with pytest.raises(ValueError, match="uint16"):
        sparseft.Mask.load(path)
    files.save(path, "mask", {"indices.elsewhere": codes}, mask.header())
    with pytest.raises(ValueError, match="unknown parameters"):
        sparseft.Mask.load(path)
    files.save(path, "mask", {}, {"shapes": {}})
    with pytest.raises(ValueError, match="header is incomplete"):
        sparseft.Mask.load(path)


def test_a_failed_save_keeps_the_older_file(tmp_path, monkeypatch):
    """A full disk while writing: the old mask is whole, and nothing is left lying about."""
    mask, path = small_mask(), tmp_path / "mask.safetensors"
    mask.save(path)

    def full(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*nothing at that path was changed"):
        small_mask(dense="2.bias").save(path)
    assert sparseft.Mask.load(path) == mask
    assert os.listdir(tmp_path) == ["mask.safetensors"]


def test_saving_into_a_folder_that_is_not_there_says_so(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        small_mask().save(tmp_path / "nowhere" / "mask")


def test_a_mask_is_shown_in_one_line():
    few = small_mask(dense="1.bias")
    assert (
        repr(few)
        == f"Mask(random: {few.k} of {few.n} entries, density {few.density:.4%}, 3 tensors, dense=['1.bias'])"
    )
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(5)))
    many = sparseft.select("random", model, k=4, dense="*bias")
    assert repr(many).endswith("dense=['0.bias', '1.bias', '2.bias'] and 2 more)")


def test_dense_parameters_are_given_with_their_shapes():
    with pytest.raises(TypeError, match=r"dense must map parameter names to shapes, got 'head\.\*'; patterns are for"):
        sparseft.top_k({"a": torch.arange(1.0, 5.0)}, k=2, dense="head.*")
