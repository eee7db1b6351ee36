"""What the options that all optimizers share do to a rule."""

import io

import pytest
import torch
from optimizers import OPTIONS, PLAIN, TORCH, model_and_groups, parameters_and_positions, train

import sparseft
import sparseft.testing
from sparseft.optim import OPTIMIZERS

plain_optimizers = pytest.mark.parametrize("name", PLAIN)
every_device = pytest.mark.parametrize("device", sparseft.testing.devices())


@plain_optimizers
@every_device
def test_decay_to_the_pretrained_is_decay_of_the_difference(name, device):
    """Weights move as torch's optimizer moves their distance from the start, which decays toward zero."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=generator).to(device)
    index = torch.arange(0, 50, 3, dtype=torch.int32, device=device)
    weight = torch.nn.Parameter(start.clone())
    optimizer = OPTIMIZERS[name](
        [{"params": [weight], "indices": [index]}], **{**PLAIN[name], "weight_decay": 0.5}, decay_to="pretrained"
    )
    difference = torch.nn.Parameter(torch.zeros(len(index), device=device))
    reference = TORCH[name]([difference], **{**PLAIN[name], "weight_decay": 0.5})
    for _ in range(30):
        weight.grad = torch.randn(50, generator=generator).to(device)
        difference.grad = weight.grad[index.long()]
        optimizer.step()
        reference.step()
    assert difference.abs().max() > 0.1
    torch.testing.assert_close(weight.detach()[index.long()], start[index.long()] + difference.detach())


@plain_optimizers
@pytest.mark.parametrize("dtype", sparseft.testing.DTYPES)
def test_a_weight_that_is_the_pretrained_one_does_not_decay(name, dtype):
    weight = torch.nn.Parameter(torch.linspace(-3, 7, 30).to(dtype))
    before = weight.detach().clone()
    options = {**PLAIN[name], "weight_decay": 0.5}
    optimizer = OPTIMIZERS[name]([weight], **options, decay_to="pretrained")
    for _ in range(20):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert torch.equal(weight.detach(), before)


def test_the_pretrained_values_take_the_room_of_the_weights():
    model, groups = model_and_groups(torch.bfloat16)
    optimizer = sparseft.SparseSGD(groups, decay_to="pretrained")
    start = [p.detach().view(-1)[index.long()] for p, index in parameters_and_positions(model, groups)]
    train(model, optimizer, 3)
    for parameter, values in zip(model.parameters(), start, strict=True):
        kept = optimizer.state[parameter]["pretrained"]
        assert kept.dtype == torch.bfloat16
        assert torch.equal(kept, values)


@plain_optimizers
def test_a_state_saved_before_there_were_such_options_loads(name):
    model, groups = model_and_groups()
    optimizer = OPTIMIZERS[name](groups, **OPTIONS[name])
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["decay_to"]
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["decay_to"] == "zero"


@plain_optimizers
def test_options_that_do_not_exist_are_refused(name):
    parameter = torch.nn.Parameter(torch.randn(10))
    with pytest.raises(TypeError, match="has no option fused; it has maximize"):
        OPTIMIZERS[name]([parameter], fused=True)
    with pytest.raises(ValueError, match="decay_to must be one of 'zero', 'pretrained', got 'start'"):
        OPTIMIZERS[name]([parameter], decay_to="start")


@pytest.mark.parametrize("device", sparseft.testing.devices())
def test_pretrained_values_that_do_not_fit_change_nothing(device):
    for function in sparseft.testing.implementations("lion_", device).values():
        for bad, error in [
            ([], "pretrained|lists"),
            ([5], "one a selected|of 2 elements"),
            ([2, 2], "pretrained|lists"),
        ]:
            weight, index = torch.ones(9, device=device), torch.tensor([1, 5], device=device)
            lists = [weight], [weight], [index], [torch.zeros(2, device=device)], [torch.zeros(0, device=device)]
            step, pretrained = torch.tensor(0.0, device=device), [torch.zeros(k, device=device) for k in bad]
            options = {"beta1": 0.9, "beta2": 0.99, "lr": 0.1, "weight_decay": 0.1, "pretrained": pretrained}
            with pytest.raises((ValueError, RuntimeError), match=error):
                function(*lists, [step], **options)
            assert (weight == 1).all()
            assert step == 0
