"""A step on half a percent of the weights, against torch's fused step on all of them.

Floor: the memory lines that hold selected weights read and written, those of their gradients read; 4 bytes of index
and each fp32 state read and written, an entry. The lists are drawn evenly, so nearly every entry has a line to itself.
"""

import harness
import pytest
import torch
import workloads

import sparseft

SHAPES = {
    "25 M weights in 25 tensors": lambda: [torch.Size([workloads.ENTRIES])] * workloads.TENSORS,
    "MiniLM, 22.7 M weights in 105 tensors": lambda: [p.shape for p in workloads.encoder("cpu").parameters()],
    "7 B weights in 224 tensors": lambda: [torch.Size([31_250_000])] * 224,
}
SPREAD, ENCODER, LARGE = SHAPES
OPTIONS = {
    "": {},
    "states in 8 bits": {"state_bits": 8},
    # to a norm that is never reached, so that both train alike
    "clipping": {"max_norm": 1e9},
}
PLAIN, LOW_BITS, CLIPPING = OPTIONS
# op, weights, density, dtype, untimed steps before the timed one, options
STEPS = [
    ("adamw_", SPREAD, 0.005, torch.float32, 0, PLAIN),
    # as optimizers are often measured: the caches then hold what so few entries need
    ("adamw_", SPREAD, 0.005, torch.float32, 3, PLAIN),
    ("adamw_", SPREAD, 0.005, torch.float32, 0, LOW_BITS),
    ("adamw_", SPREAD, 0.005, torch.float32, 0, CLIPPING),
    ("adamw_", SPREAD, 0.05, torch.float32, 0, PLAIN),
    ("adamw_", ENCODER, 0.005, torch.float32, 0, PLAIN),
    ("sgd_", SPREAD, 0.005, torch.float32, 0, PLAIN),
]
LARGE_STEPS = [("adamw_", LARGE, 0.05, torch.bfloat16, 0, options) for options in (PLAIN, LOW_BITS)]
EVERYWHERE = {"cpu": STEPS, "cuda": [*STEPS, *LARGE_STEPS]}


@pytest.mark.parametrize(
    ("device", "op", "weights", "density", "dtype", "warm", "options"), harness.on_devices(EVERYWHERE)
)
def test_step(compare, device, op, weights, density, dtype, warm, options):
    params = workloads.parameters(SHAPES[weights](), device, dtype)
    indices = workloads.selection(params, density)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    for other, param in zip(others, params, strict=True):
        other.grad = param.grad
    ours, dense = optimizers(op, params, indices, others, OPTIONS[options])
    check(ours, dense, params, others, indices)
    shape = ", ".join(part for part in (weights, options, "step after step" if warm else "") if part)
    case = harness.Case(op, shape, density, dtype, device)
    name = f"torch.optim.{type(dense).__name__}(fused=True), all weights"
    step = dense.step
    if options == CLIPPING:
        name = f"clip_grad_norm_, {name}"

        def step():
            torch.nn.utils.clip_grad_norm_(others, OPTIONS[CLIPPING]["max_norm"])
            dense.step()

    compare(
        case,
        ours.step,
        {name: step},
        rounds=31,
        warm=warm,
        # clipping reads what the step reads, just before it
        floor=None if warm or options == CLIPPING else floor(indices, ours, dtype, device),
        sizes=None if warm else {case.backend: state_bytes(ours), name: state_bytes(dense)},
    )


@pytest.mark.parametrize(("device", "warm"), harness.on_devices({"cpu": [(0,), (3,)], "cuda": [(0,), (3,)]}))
def test_compact_step(compare, device, warm):
    """The step of training with compact gradients: of each selected weight there is a gradient, and no other.

    Floor: the lines of selected weights read and written; for each entry 4 bytes of index and of gradient read, those
    of its two states read and written.
    """
    params = workloads.parameters(SHAPES[SPREAD](), device, torch.float32)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    indices = workloads.selection(params, 0.005)
    for other, param in zip(others, params, strict=True):
        other.grad, param.grad = param.grad, None
    model = torch.nn.ParameterList(params)
    names = [name for name, _ in model.named_parameters()]
    mask = sparseft.Mask(
        dict(zip(names, indices, strict=True)), {name: model.get_parameter(name).shape for name in names}
    )
    dense = torch.optim.AdamW(others, fused=True, lr=1e-3, weight_decay=0.01)
    with sparseft.compact_gradients(model, mask, values=False):
        groups = mask.param_groups(model)
        for leaf, other, index in zip(groups[0]["params"], others, indices, strict=True):
            leaf.grad = other.grad.view(-1)[index.long()]
        ours = sparseft.SparseAdamW(groups, lr=1e-3, weight_decay=0.01)
        check(ours, dense, params, others, indices)
        shape = ", ".join((SPREAD, "compact gradients", *(["step after step"] if warm else [])))
        k = sum(index.numel() for index in indices)
        moved = 2 * harness.lines_touched(indices, 4, device) + 8 * k + 2 * state_bytes(ours)
        compare(
            harness.Case("adamw_", shape, 0.005, torch.float32, device),
            ours.step,
            {"torch.optim.AdamW(fused=True), all weights": dense.step},
            rounds=31,
            warm=warm,
            floor=None if warm else harness.Floor(moved=moved),
        )


def optimizers(op, params, indices, others, extra):
    group = {"params": params, "indices": indices}
    if op == "adamw_":
        options = {"lr": 1e-3, "weight_decay": 0.01}
        return sparseft.SparseAdamW([group], **options, **extra), torch.optim.AdamW(others, fused=True, **options)
    options = {"lr": 1e-3, "momentum": 0.9}
    return sparseft.SparseSGD([group], **options, **extra), torch.optim.SGD(others, fused=True, **options)


def floor(indices, optimizer, dtype, device):
    k = sum(index.numel() for index in indices)
    return harness.Floor(
        moved=3 * harness.lines_touched(indices, dtype.itemsize, device) + 4 * k + 2 * state_bytes(optimizer)
    )


def check(ours, dense, params, others, indices):
    """Three steps of both from the same weights: selected entries agree, the others stay as they were."""
    # 8 bits keep about a digit of the moments, and so of each step
    close = {"rtol": 0, "atol": 5e-4} if ours.defaults["state_bits"] == 8 else {}
    before = [param.detach().clone() for param in params]
    for _ in range(3):
        ours.step()
        dense.step()
    for start, param, other, index in zip(before, params, others, indices, strict=True):
        torch.testing.assert_close(param.view(-1)[index.long()], other.view(-1)[index.long()], **close)
        start.view(-1)[index.long()] = param.detach().view(-1)[index.long()]
        assert torch.equal(start, param.detach())


def state_bytes(optimizer):
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())
