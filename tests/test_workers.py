"""Disjoint masks, and merging: against plain loops and dense copies of weights."""

import copy
import itertools

import numpy as np
import pytest
import torch

import sparseft
import sparseft.testing
from sparseft import workers
from sparseft.mask import fingerprint


def base_model(dtype=torch.float32, device="cpu", tied=False):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(37, 61), torch.nn.Tanh(), torch.nn.Linear(61, 37))
    model.append(torch.nn.Linear(37, 61))
    if tied:
        model[3].weight = model[0].weight
    return model.to(device, dtype)


def random_scores(model, seed=0, values=None):
    """Return scores with a long tail, or, with `values`, scores of that many levels, most of which tie."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, parameter in model.named_parameters():
        score = torch.randn(parameter.shape, generator=generator).abs() ** 5
        scores[name] = (
            score if values is None else torch.randint(1, values + 1, score.shape, generator=generator) / 1.0
        )
    return scores


def entries(mask):
    return [(name, int(place)) for name, index in mask.items() for place in index]


def trained(base, mask, seed, steps=2):
    """Return a copy of the base that was trained on data of its own, and its delta."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 37, generator=generator).to(next(model.parameters()))).square().sum().backward()
        optimizer.step()
    return model, sparseft.Delta.of(model, mask)


def bits(tensor):
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().copy()


def weights_of(model):
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


def dealt(ranking, count):
    """Deal a ranking by hand, in rounds that go there and back."""
    hands = [[] for _ in range(count)]
    order = itertools.cycle([*range(count), *reversed(range(count))])
    for entry, worker in zip(ranking, order, strict=False):
        hands[worker].append(entry)
    return hands


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("values", [None, 3], ids=["tail", "ties"])
def test_the_best_entries_are_dealt_there_and_back(count, values):
    model = base_model()
    scores = random_scores(model, values=values)
    masks = workers.disjoint_masks(model, scores, count, k=101)
    assert [mask.k for mask in masks] == [101] * count
    # Python's sort is stable: ties stay in the order of (parameter, index)
    ranking = [(float(v), name, i) for name, score in scores.items() for i, v in enumerate(score.flatten().tolist())]
    best = [entry[1:] for entry in sorted(ranking, key=lambda entry: -entry[0])[: count * 101]]
    for mask, wanted in zip(masks, dealt(best, count), strict=True):
        assert set(entries(mask)) == set(wanted)
        assert all(torch.equal(index, index.unique()) for index in mask.values())
    totals = [sum(float(scores[name].flatten()[place]) for name, place in entries(mask)) for mask in masks]
    assert max(totals) - min(totals) <= max(float(score.max()) for score in scores.values())


def test_a_density_is_of_each_worker():
    model = base_model()
    n = sum(parameter.numel() for parameter in model.parameters())
    masks = workers.disjoint_masks(model, random_scores(model), 3, density=0.0123)
    assert [mask.k for mask in masks] == [int(0.0123 * n)] * 3
    assert masks[1].n == n
    assert masks[1].info["density_asked"] == 0.0123
    assert masks[1].info["workers"].items() >= {"of": 3, "parts": [1], "entries": 3 * masks[0].k}.items()
    assert masks[1].fingerprint == fingerprint(model)


def test_all_entries_can_be_dealt_and_not_one_more():
    model = torch.nn.Linear(4, 3)
    scores = {name: torch.rand_like(parameter) + 0.1 for name, parameter in model.named_parameters()}
    masks = workers.disjoint_masks(model, scores, 5, k=3)
    assert sorted(entry for mask in masks for entry in entries(mask)) == sorted(
        [("weight", i) for i in range(12)] + [("bias", i) for i in range(3)]
    )
    with pytest.raises(ValueError, match="5 disjoint masks of 4 entries need 20, and 15 are selectable"):
        workers.disjoint_masks(model, scores, 5, k=4)
    with pytest.raises(ValueError, match="3 disjoint masks of 6 entries need 18, and 15"):
        workers.disjoint_masks(model, scores, 3, density=0.4)


def test_dense_parameters_are_the_same_for_all_and_not_selected():
    model = base_model()
    masks = workers.disjoint_masks(model, random_scores(model), 2, k=50, dense="3.*")
    for mask in masks:
        assert list(mask.dense) == ["3.weight", "3.bias"]
        assert "3.weight" not in mask.shapes
        assert "3.weight" not in mask.fingerprint


def test_tied_parameters_are_dealt_once():
    model = base_model(tied=True)
    masks = workers.disjoint_masks(model, random_scores(model), 2, k=200)
    assert masks[0].aliases == {"3.weight": "0.weight"}
    assert masks[0].intersection(masks[1]).k == 0
    deltas = [trained(model, mask, seed)[1] for seed, mask in enumerate(masks)]
    merged = base_model(tied=True)
    workers.merge(deltas).apply(merged)
    assert merged[3].weight is merged[0].weight
    assert torch.equal(merged[0].weight.view(-1)[masks[1]["0.weight"].long()], deltas[1].values["0.weight"])


@pytest.mark.parametrize("device", sparseft.testing.devices())
@pytest.mark.parametrize(("k", "count"), [(100, 4), (103, 4), (5, 5), (1, 1), (2999, 7)])
def test_a_mask_is_split_at_random_into_parts_that_differ_by_one(k, count, device):
    model = base_model(device=device)
    mask = sparseft.select("random", model, k=k, dense="3.bias").to(device)
    parts = workers.split(mask, count, seed=3)
    assert sorted(part.k for part in parts) == sorted([k // count + (i < k % count) for i in range(count)])
    union = [entry for part in parts for entry in entries(part)]
    assert len(union) == len(set(union)) == k
    assert set(union) == set(entries(mask))
    for part in parts:
        assert (part.dense, part.fingerprint, part.shapes) == (mask.dense, mask.fingerprint, mask.shapes)
        assert all(index.device.type == torch.device(device).type for index in part.values())
    again = workers.split(mask, count, seed=3)
    assert parts == again
    if count > 1 and k > 50:
        assert parts != workers.split(mask, count, seed=4)
        first = {place for name, place in entries(parts[0]) if name == "0.weight"}
        all_of = sorted(place for name, place in entries(mask) if name == "0.weight")
        assert first != set(all_of[: len(first)]), "a random part is not the beginning"


def test_parts_survive_their_files(tmp_path):
    parts = workers.split(sparseft.select("random", base_model(), k=90), 3)
    parts[2].save(tmp_path / "part")
    again = sparseft.Mask.load(tmp_path / "part")
    assert again == parts[2]
    assert again.info == parts[2].info


def test_long_index_lists_are_split_and_merged():
    """Parameters of 2^31 elements and more have int64 lists."""
    shape = (2**31 + 77,)
    wanted = torch.tensor([0, 5, 2**30, 2**31 - 1, 2**31, 2**31 + 76])
    mask = sparseft.Mask({"table": wanted}, {"table": shape})
    parts = workers.split(mask, 2, seed=1)
    assert [part["table"].dtype for part in parts] == [torch.int64] * 2
    deltas = [sparseft.Delta(part, {"table": part["table"].double().float()}, {}) for part in parts]
    merged = workers.merge(deltas)
    assert torch.equal(merged.mask["table"], wanted)
    assert torch.equal(merged.values["table"], wanted.double().float())


@pytest.mark.parametrize("device", sparseft.testing.devices())
@pytest.mark.parametrize("dtype", sparseft.testing.DTYPES)
def test_the_merged_model_has_each_workers_bits(tmp_path, dtype, device):
    base = base_model(dtype, device)
    masks = workers.split(sparseft.select("random", base, k=601), 3)
    found = [trained(base, mask, seed) for seed, mask in enumerate(masks)]
    merged = workers.merge(delta for _, delta in found)
    merged.save(tmp_path / "merged")
    model = copy.deepcopy(base)
    applied = sparseft.load_delta(model, tmp_path / "merged")

    # written from the definition: the base, and over it each worker's own entries
    wanted = {name: bits(parameter).reshape(parameter.numel(), -1) for name, parameter in base.named_parameters()}
    for (worker, _), mask in zip(found, masks, strict=True):
        own = {name: bits(parameter).reshape(parameter.numel(), -1) for name, parameter in worker.named_parameters()}
        changed = 0
        for name, place in entries(mask):
            changed += bool((wanted[name][place] != own[name][place]).any())
            wanted[name][place] = own[name][place]
        assert changed > 0.9 * mask.k
    for name, parameter in model.named_parameters():
        assert np.array_equal(bits(parameter), wanted[name].reshape(-1)), name

    applied.restore()
    assert fingerprint(model) == fingerprint(base)
    assert merged.mask.k == 601
    assert merged.mask.info["workers"] == {**masks[0].info["workers"], "parts": [0, 1, 2]}
    assert merged.mask.info["method"] == "random"


def test_merging_parts_of_parts_is_merging_all():
    base = base_model()
    masks = workers.split(sparseft.select("random", base, k=300), 3)
    deltas = [trained(base, mask, seed)[1] for seed, mask in enumerate(masks)]
    two = workers.merge(deltas[1:], partial=True)
    assert two.mask.info["workers"] == {**masks[0].info["workers"], "parts": [1, 2]}
    models = []
    for merged in (workers.merge(deltas), workers.merge([two, deltas[0]])):
        models.append(copy.deepcopy(base))
        merged.apply(models[-1])
        assert merged.mask.info["workers"]["parts"] == [0, 1, 2]
    assert fingerprint(models[0]) == fingerprint(models[1])


def test_parts_that_do_not_make_the_whole_are_refused():
    base = base_model()
    mask, other = (sparseft.select("random", base, k=300, seed=seed) for seed in (0, 1))
    halves, thirds = workers.split(mask, 2), workers.split(mask, 3)
    again = workers.split(mask, 2, seed=1)
    quarters = workers.split(halves[0], 2)

    def merged(*parts, **options):
        return workers.merge([sparseft.Delta.of(base, part) for part in parts], **options)

    assert halves[1].info == workers.split(mask, 2)[1].info, "processes that split alike agree"
    for options in ({}, {"partial": True}):
        with pytest.raises(ValueError, match="must be of the parts of one mask, got parts of 2, and not all of each"):
            merged(halves[0], workers.split(other, 2)[1], overlap="mean", **options)
    for parts in ((halves[0], thirds[1]), (halves[0], again[1]), (halves[1], quarters[0]), quarters):
        with pytest.raises(
            ValueError, match=r"got none of [\d,]+ of the 300 entries dealt: these parts are of two sp"
        ):
            merged(*parts, overlap="mean")
        assert merged(*parts, overlap="mean", partial=True).mask.k < 300
    with pytest.raises(ValueError, match=r"got none of \[1\]; add them"):
        merged(quarters[0])
    for parts in ((*quarters, halves[1]), (*workers.split(halves[0], 3), halves[1])):
        assert merged(*parts).mask == mask
        assert workers.merge([merged(*parts)]).mask == mask
    inner = merged(*quarters, partial=True)
    assert workers.merge([inner, sparseft.Delta.of(base, halves[1])]).mask == mask

    # two that are whole, of other masks, are two deltas like any
    wholes = [merged(*halves), merged(*workers.split(other, 2))]
    assert workers.merge(wholes, overlap="mean").mask == mask.union(other)


def test_parts_from_before_masks_had_digests_are_known_by_number():
    base = base_model()
    parts = workers.split(sparseft.select("random", base, k=300), 2)
    for number, part in enumerate(parts):
        part.info["workers"] = {"of": 2, "parts": [number]}
    deltas = [sparseft.Delta.of(base, part) for part in parts]
    assert workers.merge(deltas).mask.info["workers"] == {"of": 2, "parts": [0, 1]}
    with pytest.raises(ValueError, match=r"all 2 workers of a split must be there, got none of \[1\]"):
        workers.merge(deltas[:1])
    new = workers.split(sparseft.select("random", base, k=300), 2)
    assert workers.merge([deltas[0], sparseft.Delta.of(base, new[1])]).mask.k == 300


def test_special_values_are_taken_over_bit_for_bit():
    base = torch.nn.Linear(3, 2, bias=False)
    # -0, the largest number, and two that are subnormal
    special = torch.tensor([-0x80000000, 0x7F7FFFFF, 0x00000001, 0x007FFFFF], dtype=torch.int32).view(torch.float32)
    mask = sparseft.Mask({"weight": torch.arange(4, dtype=torch.int32)}, {"weight": (2, 3)})
    first, second = workers.split(mask, 2)
    deltas = [sparseft.Delta(part, {"weight": special[part["weight"].long()]}, {}) for part in (first, second)]
    workers.merge(deltas).apply(base)
    assert base.weight.detach().view(-1)[:4].view(torch.int32).tolist() == special.view(torch.int32).tolist()


@pytest.mark.parametrize("dtype", sparseft.testing.DTYPES)
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.25]])
def test_what_several_trained_takes_their_weighted_mean(dtype, weights):
    base = base_model(dtype)
    masks = [sparseft.select("random", base, density=0.4, seed=seed, dense="3.*") for seed in range(3)]
    found = [trained(base, mask, seed) for seed, mask in enumerate(masks)]
    merged = workers.merge([delta for _, delta in found], overlap="mean", weights=weights)
    model = copy.deepcopy(base)
    merged.apply(model)

    shares, own = weights or [1.0] * 3, [weights_of(worker) for worker, _ in found]
    after = weights_of(model)
    holders = [set(entries(mask)) for mask in masks]
    overlapping = 0
    for name, parameter in base.named_parameters():
        flat, result = parameter.detach().view(-1), after[name].view(-1)
        for place in range(flat.numel()):
            who = [w for w in range(3) if name in masks[w].dense or (name, place) in holders[w]]
            if len(who) < 2:
                wanted = own[who[0]][name].view(-1)[place] if who else flat[place]
            else:
                overlapping += 1
                mean = sum(shares[w] * own[w][name].view(-1)[place].item() for w in who) / sum(shares[w] for w in who)
                wanted = torch.tensor(mean, dtype=torch.float64).to(dtype)
            if len(who) < 2:
                assert torch.equal(result[place], wanted)
            else:
                torch.testing.assert_close(result[place], wanted, rtol=torch.finfo(dtype).eps, atol=0)
    assert overlapping > 1000


def test_one_dense_parameter_is_taken_over_and_equal_ones_stay():
    base = base_model(torch.bfloat16)
    (mask,) = workers.split(sparseft.select("random", base, k=50, dense="3.*"), 1)
    model, delta = trained(base, mask, 0)
    for deltas, overlap in (([delta], "error"), ([delta, delta, delta], "mean")):
        merged = workers.merge(deltas, overlap=overlap)
        for name in ("3.weight", "3.bias"):
            assert torch.equal(merged.dense[name], model.get_parameter(name))
        assert all(torch.equal(merged.values[name], value) for name, value in delta.values.items())
        assert merged.dense["3.bias"].data_ptr() != delta.dense["3.bias"].data_ptr()


def test_rounds_end_in_one_delta_of_the_first_base(tmp_path):
    base = base_model()
    model, total = copy.deepcopy(base), None
    for round_ in range(3):
        before = weights_of(model)
        masks = workers.disjoint_masks(model, random_scores(model, seed=round_), 2, k=150, dense="3.bias")
        merged = workers.merge(trained(model, mask, 10 * round_ + i)[1] for i, mask in enumerate(masks))
        assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
        merged.apply(model)
        total = merged.mask if total is None else total.union(merged.mask)
    sparseft.save_delta(model, total, tmp_path / "delta")
    again = copy.deepcopy(base)
    sparseft.load_delta(again, tmp_path / "delta")
    assert fingerprint(again) == fingerprint(model) != fingerprint(base)


def test_compact_gradients_train_parts():
    base = base_model(torch.bfloat16)
    masks = workers.split(sparseft.select("random", base, k=301), 2)
    models = [copy.deepcopy(base) for _ in masks]
    deltas = []
    for model, mask in zip(models, masks, strict=True):
        with sparseft.compact_gradients(model, mask):
            optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=0.05)
            model(torch.ones(2, 37, dtype=torch.bfloat16)).square().sum().backward()
            optimizer.step()
            deltas.append(sparseft.Delta.of(model, mask))
    merged = copy.deepcopy(base)
    workers.merge(deltas).apply(merged)
    for name, parameter in merged.named_parameters():
        flat = base.get_parameter(name).detach().clone().view(-1)
        for model, mask in zip(models, masks, strict=True):
            if name in mask:
                flat[mask[name].long()] = model.get_parameter(name).detach().view(-1)[mask[name].long()]
        assert torch.equal(parameter.detach().view(-1), flat)


def test_a_delta_in_memory_is_the_one_on_disk_and_does_not_follow_the_model(tmp_path):
    base = base_model()
    mask = sparseft.select("random", base, k=40, dense="3.*")
    model, delta = trained(base, mask, 0)
    sparseft.save_delta(model, mask, tmp_path / "saved", {"task": "mine"})
    wanted = weights_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    delta.save(tmp_path / "kept")
    loaded = sparseft.Delta.load(tmp_path / "saved")
    assert loaded.mask.info["task"] == "mine"
    assert "task" not in mask.info
    for other in (loaded, sparseft.Delta.load(tmp_path / "kept")):
        assert other.mask == mask
        assert all(torch.equal(other.values[name], wanted[name].view(-1)[mask[name].long()]) for name in mask)
        assert all(torch.equal(other.dense[name], wanted[name]) for name in mask.dense)


def test_numbers_of_workers_and_scores_are_checked():
    model = base_model()
    mask = sparseft.select("random", model, k=7)
    scores = random_scores(model)
    for count, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), (8, ValueError)):
        with pytest.raises(error, match="workers must be"):
            workers.split(mask, count)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        workers.disjoint_masks(model, scores, 0, k=3)
    with pytest.raises(ValueError, match="give either density or k"):
        workers.disjoint_masks(model, scores, 2)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module"):
        workers.disjoint_masks(scores, scores, 2, k=3)
    with pytest.raises(ValueError, match="dense pattern 'head' matches no parameter"):
        workers.disjoint_masks(model, scores, 2, k=3, dense="head")
    with pytest.raises(ValueError, match="mask is of another model"):
        workers.disjoint_masks(torch.nn.Linear(37, 61), scores, 2, k=3)
    name = next(iter(mask))
    with pytest.raises(ValueError, match=rf"scores of {name} must have shape .*, got none"):
        workers.split(mask, 2, {})
    with pytest.raises(ValueError, match=rf"scores of {name} must have shape"):
        workers.split(mask, 2, {**scores, name: scores[name].flatten()[1:]})
    for dealt in (lambda: workers.split(mask, 2, "scores"), lambda: workers.disjoint_masks(model, "scores", 2, k=3)):
        with pytest.raises(TypeError, match="scores must be a mapping from parameter name to tensor, got str"):
            dealt()
    scores[name].fill_(float("nan"))
    with pytest.raises(ValueError, match="scores must be finite"):
        workers.split(mask, 2, scores)


def test_deltas_that_do_not_go_together_are_refused():
    base = base_model()
    mask = sparseft.select("random", base, k=100, dense="3.bias")
    masks = workers.split(mask, 3)
    deltas = [trained(base, part, seed)[1] for seed, part in enumerate(masks)]

    with pytest.raises(ValueError, match="nothing to merge"):
        workers.merge([])
    with pytest.raises(TypeError, match="merge takes deltas, got Mask"):
        workers.merge(masks)
    with pytest.raises(TypeError, match="merge takes a list of deltas, got one Delta; put it in a list"):
        workers.merge(deltas[0])
    with pytest.raises(ValueError, match=r"got none of \[1, 2\] and several of \[0\]; add them"):
        workers.merge([deltas[0], deltas[0]])
    for weights in ("abc", [1.0, "2", 3.0], [1.0, None, 1.0]):
        with pytest.raises(TypeError, match="weights must be 3 positive numbers"):
            workers.merge(deltas, weights=weights)
    with pytest.raises(ValueError, match=r"must be disjoint, got \d+ entries of 0.weight in several"):
        workers.merge([*deltas, deltas[1]])
    with pytest.raises(ValueError, match='overlap must be "error" or "mean"'):
        workers.merge(deltas, overlap="sum")
    with pytest.raises(ValueError, match=r"all 3 workers of a split must be there, got none of \[1\]"):
        workers.merge([deltas[0], deltas[2]])
    assert workers.merge([deltas[0], deltas[2]], partial=True).mask.k == masks[0].k + masks[2].k
    for weights in ([1.0], [1.0, 2.0, 0.0], [1.0, 2.0, -1.0], [1.0, 1.0, float("nan")], [1.0, 1.0, float("inf")]):
        with pytest.raises(ValueError, match="weights must be 3 positive numbers"):
            workers.merge(deltas, weights=weights)

    other = base_model()
    with torch.no_grad():
        other[2].weight[3, 3] += 1e-6
    of_other = sparseft.Delta.of(other, sparseft.select("random", other, k=9, dense="3.bias"))
    with pytest.raises(ValueError, match=r"of the same base, got other base weights in deltas\[1\].*: 2.weight;"):
        workers.merge([deltas[0], of_other])
    headless = sparseft.Delta.of(base, sparseft.select("random", base, k=9, include="0.*", dense="3.bias"))
    with pytest.raises(ValueError, match=r"same selectable parameters.*2.bias, 2.weight, 3.weight;"):
        workers.merge([deltas[0], headless])
    low = base_model(torch.bfloat16)
    of_low = sparseft.Delta.of(low, sparseft.Mask(dict(masks[1]), mask.shapes, dense=mask.dense))
    plain = [
        sparseft.Delta(sparseft.Mask(dict(d.mask), mask.shapes, dense=mask.dense), d.values, d.dense) for d in deltas
    ]
    with pytest.raises(ValueError, match="must have the same dtypes"):
        workers.merge([plain[0], of_low])
    same = sparseft.Mask(dict(masks[1]), {**mask.shapes, "3.bias": (61,)}, fingerprint=mask.fingerprint)
    with pytest.raises(ValueError, match="got others in"):
        workers.merge([deltas[0], sparseft.Delta(same, deltas[1].values, {})])


def test_values_of_a_worker_that_are_not_finite_are_refused(tmp_path):
    base = base_model()
    masks = workers.split(sparseft.select("random", base, k=100, dense="3.bias"), 3)
    deltas = [sparseft.Delta.of(base, mask) for mask in masks]
    for held in (deltas[1].values, deltas[1].dense):
        name = next(iter(held))
        kept = held[name].clone()
        held[name].view(-1)[1] = float("nan")
        deltas[1].save(tmp_path / "delta")
        for read in (deltas[1], sparseft.Delta.load(tmp_path / "delta")):
            with pytest.raises(ValueError, match=rf"NaN or infinite in {name} of deltas\[1\]; training diverged"):
                workers.merge([deltas[0], read, deltas[2]])
        held[name].copy_(kept)
    workers.merge(deltas)


def test_an_exchange_needs_processes():
    with pytest.raises(RuntimeError, match="init_process_group"):
        workers.exchange(base_model(), [])
