"""Schedules whose modules compute with other weights than their parameters, in compiled models."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparseft
from sparseft.schedules import DiffPruning, DPSMix, Mixout

STEPS = 14
MAKE = {
    "DPSMix": lambda model, optimizer: DPSMix(model, optimizer, 0.5, stage_steps=2),
    "Mixout": lambda model, optimizer: Mixout(model, optimizer, 0.5),
    "DiffPruning": lambda model, optimizer: DiffPruning(model, optimizer, 0.2, 9, log_alpha=0.5),
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(x + torch.tanh(2 * self.linear(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(16, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.relu())


def net():
    torch.manual_seed(0)
    return Net()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def eager(model, backend):
    return model


def whole(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def parts(model, backend):
    for part in (*model.blocks, model.head):
        part.compile(backend=backend)
    return model


def forward_of_a_layer(model, backend):
    model.head.forward = torch.compile(model.head.forward, backend=backend)
    return model


def step(compiled, at):
    x, y = batch(at)
    output = compiled(x)
    nn.functional.cross_entropy(output, y).backward()
    return output.detach().clone()


def outputs(name, way, backend=None, compiled_before=False):
    """Return what a model computes in several cycles, in evaluation mode too, and after the schedule's end."""
    model = net()
    optimizer = sparseft.SparseAdamW(model.parameters(), lr=1e-2)
    if compiled_before:
        for each in (way(net(), backend), way(model, backend)):
            step(each, 0)
            with torch.no_grad():
                each(batch(0)[0])
        optimizer.zero_grad()
    schedule, frames = MAKE[name](model, optimizer), backend.frame_count if backend else 0
    compiled = model if compiled_before and way is not whole else way(model, backend)
    found = []
    for at in range(STEPS):
        if at == STEPS - 2:
            schedule.close()
        found.append(step(compiled, at))
        optimizer.step()
        optimizer.zero_grad()
        if at % 3 == 1:
            model.eval()
            with torch.no_grad():
                found.append(compiled(batch(at)[0]))
            model.train()
    # all but what is mixed or has gates
    assert way in (eager, forward_of_a_layer) or backend.frame_count > frames
    return found


@pytest.mark.parametrize("compiled_before", [False, True])
@pytest.mark.parametrize("way", [whole, in_place, parts, forward_of_a_layer])
@pytest.mark.parametrize("name", MAKE)
def test_compiled_models_compute_what_others_do(name, way, compiled_before):
    backend = CompileCounterWithBackend("aot_eager")
    expected = outputs(name, eager)
    found = outputs(name, way, backend, compiled_before)
    assert len(found) == len(expected) > STEPS
    for at, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, msg=lambda message, at=at: f"output {at}: {message}")


def test_one_schedule_after_another_and_models_without_one_share_compiled_code():
    model, twin = net(), net()
    compiled, its_twin = (torch.compile(each, backend="aot_eager") for each in (model, twin))
    optimizer = sparseft.SparseAdamW(model.parameters(), lr=1e-2)
    x = batch(0)[0]
    plain = net()(x)
    for seed in range(3):
        schedule = Mixout(model, optimizer, 0.5, seed=seed)
        # as if weights had been trained
        schedule._mixing.pretrained["head.weight"].mul_(2)
        mixed = model(x)
        assert not torch.equal(mixed, plain)
        torch.testing.assert_close(compiled(x), mixed)
        torch.testing.assert_close(its_twin(x), plain)
        schedule.close()
        torch.testing.assert_close(compiled(x), plain)


def test_a_whole_graph_is_refused_with_a_reason():
    model = net()
    Mixout(model, sparseft.SparseAdamW(model.parameters()), 0.5)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="has this module compute with other weights"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(batch(0)[0])


def test_modules_keep_their_arguments_and_copies_their_own_weights():
    model, x = net(), batch(0)[0]
    linear, head = model.blocks[0].linear, model.head
    # somebody's, before the schedule
    head.forward = before = lambda x: nn.Linear.forward(head, x) + 1
    plain = model(x)
    schedule = Mixout(model, sparseft.SparseAdamW(model.parameters()), 0.5)
    schedule._mixing.pretrained["blocks.0.linear.weight"].mul_(2)
    assert inspect.signature(linear.forward) == inspect.signature(nn.Linear(1, 1).forward)
    assert not torch.equal(model(x), plain)
    other = copy.deepcopy(model).blocks[0].linear
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(other(x), other.bias.expand(8, 16))
    # and after it
    covered = linear.forward
    linear.forward = lambda x: covered(x) * 1
    schedule.close()
    assert torch.equal(model(x), plain)
    assert head.forward is before
    assert "forward" not in vars(model.blocks[1].linear)
