"""A step on half a percent of the weights, against torch's fused step on all of them.

Floor: the memory lines that hold selected weights read and written, those of their gradients read; 4 bytes of index
and each fp32 state read and written, an entry. The lists are drawn evenly, so nearly every entry has a line to itself.
"""

import math

import harness
import pytest
import torch
import workloads

import sparseft
from sparseft import testing

SPREAD = [torch.Size([workloads.ENTRIES])] * workloads.TENSORS


@pytest.mark.parametrize("density", [0.005, 0.05])
@pytest.mark.parametrize("device", testing.devices())
def test_adamw(compare, device, density):
    step_of(compare, "adamw_", "25 M weights in 25 tensors", SPREAD, density, device)


@pytest.mark.parametrize("device", testing.devices())
def test_sgd(compare, device):
    step_of(compare, "sgd_", "25 M weights in 25 tensors", SPREAD, 0.005, device)


@pytest.mark.parametrize("device", testing.devices())
def test_adamw_on_an_encoder(compare, device):
    shapes = [parameter.shape for parameter in workloads.encoder("cpu").parameters()]
    name = f"MiniLM, {sum(map(math.prod, shapes)) / 1e6:.1f} M weights in {len(shapes)} tensors"
    step_of(compare, "adamw_", name, shapes, 0.005, device)


def step_of(compare, op, shape, shapes, density, device):
    params = workloads.parameters(shapes, device)
    indices = workloads.selection(params, density)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    for other, param in zip(others, params, strict=True):
        other.grad = param.grad
    group = {"params": params, "indices": indices}
    if op == "adamw_":
        ours = sparseft.SparseAdamW([group], lr=1e-3, weight_decay=0.01)
        dense = torch.optim.AdamW(others, lr=1e-3, weight_decay=0.01, fused=True)
        name, states = "torch.optim.AdamW(fused=True), all weights", 2
    else:
        ours = sparseft.SparseSGD([group], lr=1e-3, momentum=0.9)
        dense = torch.optim.SGD(others, lr=1e-3, momentum=0.9, fused=True)
        name, states = "torch.optim.SGD(fused=True), all weights", 1
    check(ours, dense, params, others, indices)
    case = harness.Case(op, shape, density, device=device)
    k = sum(index.numel() for index in indices)
    lines = harness.lines_touched(indices, 4, device)
    compare(
        case,
        ours.step,
        {name: dense.step},
        rounds=31,
        floor=harness.Floor(moved=3 * lines + k * (4 + 8 * states)),
        sizes={case.backend: state_bytes(ours), name: state_bytes(dense)},
    )


def check(ours, dense, params, others, indices):
    """Three steps of both from the same weights: selected entries agree, the others stay as they were."""
    before = [param.detach().clone() for param in params]
    for _ in range(3):
        ours.step()
        dense.step()
    for start, param, other, index in zip(before, params, others, indices, strict=True):
        torch.testing.assert_close(param.view(-1)[index.long()], other.view(-1)[index.long()])
        start.view(-1)[index.long()] = param.detach().view(-1)[index.long()]
        assert torch.equal(start, param.detach())


def state_bytes(optimizer):
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())
