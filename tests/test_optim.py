"""The drop-in contract, every clause of it, over every optimizer."""

import copy
import io
import pickle

import pytest
import torch
from optimizers import (
    OPTIMIZERS,
    OPTIONS,
    PLAIN,
    TORCH,
    assert_same,
    model_and_groups,
    parameters_and_positions,
    train,
    weights,
)

import sparseft
import sparseft.testing

plain_optimizers = pytest.mark.parametrize("name", PLAIN)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_device = pytest.mark.parametrize("device", sparseft.testing.devices())


@plain_optimizers
@every_device
@pytest.mark.parametrize("maximize", [False, True])
def test_with_every_entry_selected_it_is_torchs_own(name, device, maximize):
    model, _ = model_and_groups(device=device)
    other = copy.deepcopy(model)
    train(model, OPTIMIZERS[name](model.parameters(), **OPTIONS[name], maximize=maximize), 20)
    train(other, TORCH[name](other.parameters(), **OPTIONS[name], maximize=maximize), 20)
    torch.testing.assert_close(weights(model), weights(other))


@pytest.mark.parametrize("extra", [{"nesterov": True}, {"dampening": 0.5}, {"momentum": 0.0}])
def test_every_option_of_sgd_is_torchs(extra):
    model, _ = model_and_groups()
    other = copy.deepcopy(model)
    options = {**OPTIONS["sgd"], **extra}
    train(model, sparseft.SparseSGD(model.parameters(), **options), 20)
    train(other, torch.optim.SGD(other.parameters(), **options), 20)
    torch.testing.assert_close(weights(model), weights(other))


@every_optimizer
@every_device
@pytest.mark.parametrize("dtype", sparseft.testing.DTYPES)
def test_unselected_entries_stay_bit_identical(name, device, dtype):
    model, groups = model_and_groups(dtype, device)
    before = weights(model)
    train(model, OPTIMIZERS[name](groups, **OPTIONS[name]), 21)
    for old, (new, index) in zip(before, parameters_and_positions(model, groups), strict=True):
        outside = torch.ones(old.numel(), dtype=torch.bool, device=device)
        outside[index.long()] = False
        assert torch.equal(old.view(-1)[outside], new.view(-1)[outside])
        assert (old.view(-1)[~outside] != new.view(-1)[~outside]).float().mean() > 0.7


@every_optimizer
@pytest.mark.parametrize("dtype", sparseft.testing.DTYPES)
def test_a_saved_state_resumes_bit_for_bit(name, dtype):
    """torch casts state to the parameter's dtype on loading; a bf16 parameter's index of 1190 would become 1192."""
    model, groups = model_and_groups(dtype)
    optimizer = OPTIMIZERS[name](groups, **OPTIONS[name])
    train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 5, seed=1)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, _ = model_and_groups(dtype)
    other.load_state_dict(saved["model"])
    resumed = OPTIMIZERS[name](other.parameters(), lr=1.0)
    resumed.load_state_dict(saved["optimizer"])
    _, index = next(parameters_and_positions(other, resumed.param_groups))
    assert int(index[-1]) == 1190
    train(other, resumed, 5, seed=1)
    assert_same(weights(model), weights(other))


@every_optimizer
def test_loading_its_own_state_at_start_changes_nothing(name):
    """What accelerate's prepare does to every optimizer, before the first step, and again for every further run."""
    model, groups = model_and_groups(torch.bfloat16)
    optimizer = OPTIMIZERS[name](groups, **OPTIONS[name])
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    other, groups = model_and_groups(torch.bfloat16)
    other_optimizer = OPTIMIZERS[name](groups, **OPTIONS[name])
    train(model, optimizer, 5)
    train(other, other_optimizer, 5)
    assert_same(weights(model), weights(other))
    dtypes = {"pretrained": torch.bfloat16}
    if "8 bits" in name:
        dtypes |= dict.fromkeys(("exp_avg", "exp_avg_sq", "momentum_buffer"), torch.uint8)
    for state in optimizer.state.values():
        assert all(tensor.dtype == dtypes.get(key, torch.float32) for key, tensor in state.items())


@every_optimizer
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_alike(name, copier):
    model, groups = model_and_groups()
    optimizer = OPTIMIZERS[name](groups, **OPTIONS[name])
    train(model, optimizer, 3)
    other, other_optimizer = copier((model, optimizer))
    train(model, optimizer, 3)
    train(other, other_optimizer, 3)
    assert_same(weights(model), weights(other))


@every_optimizer
def test_closure_runs_with_gradients_and_its_loss_comes_back(name):
    model, groups = model_and_groups()
    optimizer = OPTIMIZERS[name](groups, **OPTIONS[name])

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 40)).square().sum()
        loss.backward()
        return loss

    before = weights(model)
    assert optimizer.step(closure).item() > 0
    assert not torch.equal(before[0], weights(model)[0])


@plain_optimizers
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers_drive_the_learning_rate(name, as_tensor):
    model, _ = model_and_groups()
    other = copy.deepcopy(model)
    options = {**OPTIONS[name], "lr": torch.tensor(0.05) if as_tensor else 0.05}
    optimizer = OPTIMIZERS[name]([{"params": list(model.parameters())}], **options)
    train(model, optimizer, 6, scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10))
    reference = TORCH[name](other.parameters(), **{**OPTIONS[name], "lr": 0.05})
    train(other, reference, 6, scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(reference, 10))
    torch.testing.assert_close(weights(model), weights(other))


@every_optimizer
def test_a_group_can_join_later(name):
    model, groups = model_and_groups()
    first = {key: values[:2] for key, values in groups[0].items()}
    optimizer = OPTIMIZERS[name]([first], **OPTIONS[name])
    train(model, optimizer, 2)
    before = weights(model)
    optimizer.add_param_group({**{key: values[2:] for key, values in groups[0].items()}, "lr": 0.5})
    train(model, optimizer, 1)
    assert not torch.equal(before[2], weights(model)[2])


@every_optimizer
def test_named_parameters_are_accepted(name):
    model, _ = model_and_groups()
    other = copy.deepcopy(model)
    train(model, OPTIMIZERS[name](model.named_parameters(), **OPTIONS[name]), 3)
    train(other, OPTIMIZERS[name](other.parameters(), **OPTIONS[name]), 3)
    assert_same(weights(model), weights(other))


@every_optimizer
def test_gradients_are_only_read_and_missing_ones_skipped(name):
    model, groups = model_and_groups()
    optimizer = OPTIMIZERS[name](groups, **OPTIONS[name])
    parameters = list(model.parameters())
    for parameter in parameters[:2]:
        parameter.grad = torch.randn_like(parameter)
    before, grads = weights(model), [parameter.grad.clone() for parameter in parameters[:2]]
    optimizer.step()
    assert_same(grads, [parameter.grad for parameter in parameters[:2]])
    assert_same(before[2:], weights(model)[2:])
    assert set(optimizer.state) == set(parameters[:2])


@every_optimizer
def test_gradients_of_the_selected_entries_alone_do_as_well(name):
    model, groups = model_and_groups()
    other, other_groups = model_and_groups()
    optimizers = [OPTIMIZERS[name](g, **OPTIONS[name]) for g in (groups, other_groups)]
    for twin, (parameter, index) in zip(other.parameters(), parameters_and_positions(model, groups), strict=True):
        parameter.grad = torch.randn_like(parameter)
        flat = parameter.grad.view(-1)
        twin.grad = torch.zeros_like(twin)
        twin.grad.view(-1)[index.long()] = flat[index.long()]
    for optimizer in optimizers:
        optimizer.step()
    assert_same(weights(model), weights(other))


@plain_optimizers
def test_the_state_of_another_optimizer_is_refused(name):
    _model, groups = model_and_groups()
    optimizer = OPTIMIZERS[name](groups, **OPTIONS[name])
    for other in {*PLAIN, "torch"} - {name}:
        twin, twin_groups = model_and_groups()
        if other == "torch":
            foreign = torch.optim.AdamW(twin.parameters())
        else:
            foreign = OPTIMIZERS[other](twin_groups, **OPTIONS[other])
        train(twin, foreign, 1)
        with pytest.raises(ValueError, match=f"the state must be of a {type(optimizer).__name__}"):
            optimizer.load_state_dict(foreign.state_dict())
        assert not optimizer.state


@every_optimizer
def test_state_is_k_sized(name):
    model, groups = model_and_groups(torch.bfloat16)
    optimizer = OPTIMIZERS[name](groups, **OPTIONS[name])
    train(model, optimizer, 1)
    for parameter, index in parameters_and_positions(model, groups):
        sizes = {key: value.numel() for key, value in optimizer.state[parameter].items()}
        assert sizes.pop("step") == 1
        assert sizes.pop("scales", 0) in (0, len(sizes) - 1)
        assert set(sizes.values()) == {index.numel()}


@every_optimizer
@pytest.mark.parametrize("unscale_first", [False, True])
def test_gradscaler(name, unscale_first):
    """The scaler hands over its scale; an overflow leaves weights, moments and the step count as they were."""
    model, groups = model_and_groups()
    other, other_groups = model_and_groups()
    optimizer = OPTIMIZERS[name](groups, **OPTIONS[name])
    plain = OPTIMIZERS[name](other_groups, **OPTIONS[name])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        scaler.scale(model(x).square().sum()).backward()
        if step == 2:
            model[0].weight.grad[0, 0] = float("inf")
        before = weights(model)
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert_same(before, weights(model))
            continue
        plain.zero_grad()
        other(x).square().sum().backward()
        plain.step()
    torch.testing.assert_close(weights(model), weights(other))
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


@every_optimizer
def test_every_parameter_with_a_gradient_counts_its_steps(name):
    """Also one of which nothing is selected; one that joins late starts at its own first step."""
    parameters = [torch.nn.Parameter(torch.randn(5)) for _ in range(3)]
    indices = [torch.tensor([1, 3]), torch.tensor([], dtype=torch.int64), torch.tensor([0])]
    optimizer = OPTIMIZERS[name]([{"params": parameters, "indices": indices}], **OPTIONS[name])
    for step in range(4):
        for parameter in parameters[: 3 if step else 2]:
            parameter.grad = torch.ones(5)
        optimizer.step()
    assert [float(optimizer.state[parameter]["step"]) for parameter in parameters] == [4, 4, 3]


@every_optimizer
def test_a_backward_pass_through_changed_weights_is_refused(name):
    model, groups = model_and_groups()
    optimizer = OPTIMIZERS[name](groups, **OPTIONS[name])
    loss = model(torch.randn(4, 40)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_optimizer
def test_hooks_and_profiling_see_the_step(name):
    model, groups = model_and_groups()
    optimizer = OPTIMIZERS[name](groups, **OPTIONS[name])
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
    optimizer.register_step_post_hook(lambda *args: calls.append("after"))
    train(model, optimizer, 1)
    assert calls == ["before", "after"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_of_a_16_bit_weight_add_up(dtype):
    """A step of 1e-4 on a weight of 1 is lost in bf16; the fp32 master keeps it."""
    weight = torch.nn.Parameter(torch.ones(8, dtype=dtype))
    optimizer = sparseft.SparseSGD([weight], lr=1e-4)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    torch.testing.assert_close(weight.detach().float(), torch.full((8,), 0.99), atol=5e-3, rtol=0)
    assert (weight != 1).all()


def test_a_weight_changed_from_outside_wins_over_its_master():
    """Swapping a delta in between two steps must not be undone by the next step."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = sparseft.SparseSGD([weight], lr=0.25)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with torch.no_grad():
        weight[1] = 5.0
    optimizer.step()
    assert weight.tolist() == [0.5, 4.75, 0.5, 0.5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@every_optimizer
def test_a_step_can_be_captured_in_a_cuda_graph(name):
    model, groups = model_and_groups(device="cuda")
    other, other_groups = model_and_groups(device="cuda")
    options = {**OPTIONS[name], "lr": torch.tensor(0.05, device="cuda")}
    optimizers = [OPTIMIZERS[name](g, **options) for g in (groups, other_groups)]
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        parameter.grad = torch.randn_like(parameter)
        twin.grad = parameter.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for _ in range(3):
        graph.replay()
        optimizers[1].step()
    assert_same(weights(model), weights(other))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([torch.tensor([3, 1])], ValueError, "sorted and unique"),
        ([torch.tensor([1, 1])], ValueError, "sorted and unique"),
        ([torch.tensor([-1, 1])], ValueError, r"lie in \[0, 10\), got -1..1"),
        ([torch.tensor([1, 10])], ValueError, r"lie in \[0, 10\), got 1..10"),
        ([torch.tensor([0.5])], TypeError, "int32 or int64"),
        ([torch.tensor([1]), torch.tensor([2])], ValueError, "got 2 for 1 parameters"),
    ],
)
@every_optimizer
def test_bad_index_lists_are_refused(name, indices, error, message):
    parameter = torch.nn.Parameter(torch.randn(10))
    with pytest.raises(error, match=message):
        OPTIMIZERS[name]([{"params": [parameter], "indices": indices}], lr=0.1)


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"lr": float("nan")}, {"weight_decay": -0.1}])
@every_optimizer
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match="must be at least 0"):
        OPTIMIZERS[name]([torch.nn.Parameter(torch.randn(10))], **options)


def test_options_of_one_optimizer_out_of_range_are_refused():
    parameter = torch.nn.Parameter(torch.randn(10))
    with pytest.raises(ValueError, match="betas"):
        sparseft.SparseAdamW([parameter], betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="betas"):
        sparseft.SparseLion([parameter], betas=(0.9, -0.1))
    with pytest.raises(ValueError, match="eps"):
        sparseft.SparseAdamW([parameter], eps=-1.0)
    with pytest.raises(ValueError, match="momentum"):
        sparseft.SparseSGD([parameter], momentum=-0.1)
    with pytest.raises(ValueError, match="nesterov"):
        sparseft.SparseSGD([parameter], nesterov=True)


def test_dtypes_that_are_not_served_are_refused():
    with pytest.raises(TypeError, match=r"fp32, bf16 or fp16, got torch\.float64"):
        sparseft.SparseAdamW([torch.nn.Parameter(torch.randn(3, dtype=torch.float64))])
    with pytest.raises(TypeError, match="contiguous"):
        sparseft.SparseAdamW([torch.nn.Parameter(torch.randn(3, 4).T)])


@every_optimizer
def test_a_state_that_does_not_fit_changes_nothing(name):
    model, groups = model_and_groups()
    optimizer = OPTIMIZERS[name](groups, **OPTIONS[name])
    train(model, optimizer, 1)
    other = OPTIMIZERS[name]([torch.nn.Parameter(torch.randn(5)) for _ in range(4)], lr=0.1)
    with pytest.raises(ValueError, match="must lie in"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
    with pytest.raises(ValueError, match="param"):
        OPTIMIZERS[name]([torch.nn.Parameter(torch.randn(5))], lr=0.1).load_state_dict(optimizer.state_dict())


def test_repr_is_short():
    _, groups = model_and_groups()
    assert len(repr(sparseft.SparseAdamW(groups))) < 250


def test_a_parameter_frozen_later_is_named_not_skipped_in_silence():
    layers = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = sparseft.SparseAdamW(layers.parameters())
    layers[0].weight.requires_grad_(False)
    layers(torch.ones(1, 4)).sum().backward()
    with pytest.warns(UserWarning, match=r"shape \[3, 4\] with 12 selected entries is frozen"):
        optimizer.step()


def test_a_mask_in_place_of_its_groups_is_refused():
    model = torch.nn.Linear(4, 3)
    mask = sparseft.select("random", model, density=0.5, progress=False)
    with pytest.raises(TypeError, match=r"give mask.param_groups\(model\)"):
        sparseft.SparseAdamW(mask)


def test_the_state_of_another_mask_is_refused():
    model = torch.nn.Linear(4, 3)
    one, other = (sparseft.SparseAdamW(params) for params in ([model.weight], [model.weight, model.bias]))
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters, got \[1\]; it was saved with another mask"):
        other.load_state_dict(one.state_dict())
