"""What tests and benchmarks share: inputs for every op, the implementations there are, how close is close enough."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparseft import ops, reference
from sparseft.index_lists import count, pack, positions
from sparseft.testing_optim import OPTIMIZERS, decoded, optimizer_calls

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass
class Sample:
    """One call of an op. `id` names what is odd about it."""

    id: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def clone(self) -> Sample:
        """Copy every tensor, so that an op that writes into its arguments can be called again."""
        return self.map(torch.Tensor.clone)

    def map(self, function: Callable[[Tensor], Tensor]) -> Sample:
        """Apply a function to every tensor argument, lists included."""

        def one(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return function(value)
            return [one(item) for item in value] if isinstance(value, list) else value

        kwargs = {key: one(value) for key, value in self.kwargs.items()}
        return Sample(self.id, tuple(one(value) for value in self.args), kwargs)


def devices() -> list[str]:
    """Return where ops can run here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def implementations(op: str, device: str) -> dict[str, Callable[..., Any]]:
    """Return what can run an op on a device, by name: the dispatcher's choice, and Triton, interpreted on a CPU."""
    found: dict[str, Callable[..., Any]] = {
        f"dispatcher ({ops.SERVED_BY[op][device]})": getattr(torch.ops.sparseft, op)
    }
    if op not in ops.CPU_ONLY and (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        found["triton"] = getattr(importlib.import_module("sparseft.kernels"), op)
    return found


def sample_inputs(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
    """Yield calls of an op: plain ones, and every shape that has ever broken a kernel."""
    generator = torch.Generator().manual_seed(0)
    makers: dict[str, Callable[[torch.Generator, torch.dtype], Iterator[Sample]]] = {
        "attention": _attention_inputs,
        "attention_backward": _attention_backward_inputs,
        "fisher_linear_": _fisher_linear_inputs,
        "fisher_linears_": _fisher_linears_inputs,
        "fisher_segments_": _fisher_segments_inputs,
        "layer_norm_backward": _layer_norm_backward_inputs,
        "outer_at": _outer_at_inputs,
        "selected_grad_": _selected_grad_inputs,
        "topk_indices": _topk_inputs,
        "gather": _gather_inputs,
        "delta_swap_": _delta_swap_inputs,
        **{name: functools.partial(_optimizer_inputs, name) for name in OPTIMIZERS},
    }
    for sample in makers[op](generator, dtype):
        yield sample.map(lambda tensor: tensor.to(device))


def observe(op: str, function: Callable[..., Any], sample: Sample) -> list[Tensor]:
    """Call an op on a copy of the sample and return all it returned or changed, in a fixed order."""
    call = sample.clone()
    result = function(*call.args, **call.kwargs)
    if op == "fisher_linear_":
        return [call.args[0], *call.args[4:5]]
    if op in ("fisher_segments_", "selected_grad_"):
        return [call.args[0]]
    if op == "fisher_linears_":
        return list(call.args[0])
    if op == "outer_at":
        return [result]
    if op in ("attention", "attention_backward", "layer_norm_backward", "topk_indices", "gather"):
        return list(result)
    if op == "delta_swap_":
        return [*call.args[0], *call.args[2]]
    params, indices, masters = call.args[0], call.args[2], call.args[-2]
    weights = [
        master if master.numel() else param.view(-1)[positions(index, param.numel()).long()]
        for param, index, master in zip(params, indices, masters, strict=True)
    ]
    states = list(call.args[3:-2])
    if "scales" in call.kwargs:
        states = decoded(states, call.kwargs["scales"])
    return [*params, *itertools.chain(*states), *weights, *call.args[-1]]


def exact(op: str, sample: Sample) -> list[Tensor]:
    """Return what `observe` should see, computed by the reference in fp64."""
    if op == "topk_indices":
        return observe(op, reference.topk_indices, sample)
    if "scales" in sample.kwargs:
        states = decoded(list(sample.args[3:-2]), sample.kwargs["scales"])
        kwargs = {key: value for key, value in sample.kwargs.items() if key != "scales"}
        sample = Sample(sample.id, (*sample.args[:3], *states, *sample.args[-2:]), kwargs)
    double = sample.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    if op in OPTIMIZERS:
        # fp64 weights need no master: they start where the master is, unless the weight was changed from outside
        params, indices, masters = sample.args[0], sample.args[2], sample.args[-2]
        for i, (param, index, master) in enumerate(zip(params, indices, masters, strict=True)):
            if master.numel():
                flat, selected = double.args[0][i].view(-1), positions(index, param.numel()).long()
                current = param.view(-1)[selected]
                flat[selected] = torch.where(master.to(param.dtype) == current, master.double(), current.double())
                double.args[-2][i] = master.new_empty(0, dtype=torch.float64)
    return observe(op, getattr(reference, op), double)


def assert_matches_reference(op: str, function: Callable[..., Any], sample: Sample, ulps: float = 1.0) -> None:
    """Fail unless an implementation errs at most twice as much as plain PyTorch does in the same dtype.

    Both errors are against fp64. `ulps` units in the last place of the largest exact value are allowed on top.
    """
    truth = exact(op, sample)
    baseline = observe(op, getattr(reference, op), sample)
    actual = observe(op, function, sample)
    assert len(actual) == len(baseline), f"{op} {sample.id}: got {len(actual)} results, wanted {len(baseline)}"
    for i, (got, plain, want) in enumerate(zip(actual, baseline, truth, strict=True)):
        where = f"{op} [{sample.id}] result {i}"
        assert got.dtype == plain.dtype, f"{where}: got {got.dtype}, wanted {plain.dtype}"
        assert got.shape == plain.shape, f"{where}: got {tuple(got.shape)}, wanted {tuple(plain.shape)}"
        if not got.numel():
            continue
        if not got.is_floating_point():
            assert torch.equal(got, plain), f"{where}: integers differ"
            continue
        unit = torch.finfo(got.dtype).eps * float(want.abs().max())
        error, allowed = _error(got, want), 2 * _error(plain, want) + ulps * unit
        assert error <= allowed, f"{where}: error {error:.3e}, allowed {allowed:.3e}"


def random_indices(numel: int, k: int, generator: torch.Generator) -> Tensor:
    """Return k sorted, distinct positions below numel, int32."""
    return torch.randperm(numel, generator=generator)[:k].sort().values.to(torch.int32)


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max())


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _attention_inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    """In fp32, the only dtype these ops take."""
    for n, h, g, t, s, d, e in [
        (2, 3, 3, 37, 53, 20, 20),
        (1, 1, 1, 1, 1, 1, 1),
        (2, 4, 2, 33, 70, 16, 24),
        (1, 6, 1, 64, 64, 32, 32),
        (1, 2, 2, 130, 31, 7, 66),
    ]:
        query, key = _randn(generator, n, t, h, d).transpose(1, 2), _randn(generator, n, g, s, d)
        value, bias = _randn(generator, n, g, e, s).mT, _randn(generator, n, h, t, s)
        shape = f"N{n} H{h} G{g} T{t} S{s} D{d} E{e}"
        scale = d**-0.5
        yield Sample(shape, (query, key, value, None, scale, False))
        yield Sample(f"{shape} causal", (query, key, value, None, scale, True))
        yield Sample(f"{shape} bias", (query, key, value, bias, scale, False))
        yield Sample(f"{shape} bias of keys", (query, key, value, bias[:, :1, :1].expand(n, h, t, s), scale, True))
        hidden = torch.where(bias[:1, :1] > 0, 0.0, -torch.inf)
        hidden[:, :, t // 2] = -torch.inf  # this query sees nothing
        yield Sample(f"{shape} hidden keys", (query, key, value, hidden.expand(n, h, t, s), scale, False))
    yield Sample("large scores", (100 * query, key, value, None, 1.0, False))


def _layer_norm_backward_inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    """In fp32, the only dtype this op takes."""
    for n, t, h in [(1, 1, 2), (3, 7, 5), (2, 64, 16), (5, 33, 97), (1, 130, 384), (0, 4, 8), (2, 0, 8)]:
        dy, x, weight = _randn(generator, n, t, h), 3 * _randn(generator, n, t, h) + 2, _randn(generator, h)
        mean = x.mean(-1)
        rstd = ((x - mean[..., None]).square().mean(-1) + 1e-5).rsqrt()
        yield Sample(f"N{n} T{t} H{h}", (dy, x, mean, rstd, weight))
        yield Sample(f"N{n} T{t} H{h} without a weight", (dy, x, mean, rstd, None))
    wide, tall = _randn(generator, 4, 9, 40)[..., ::2], _randn(generator, 20, 9, 4).permute(2, 1, 0)
    mean, rstd = tall.mean(-1), _randn(generator, 9, 4).T.exp()
    yield Sample("any strides", (wide, tall, mean, rstd, _randn(generator, 40)[::2]))


def _attention_backward_inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in _attention_inputs(generator, dtype):
        query, key, value, bias, scale, causal = sample.args
        out, log_sums = reference.attention(*sample.args)
        out_gradient = _randn(generator, *out.shape)
        call = (query, key, value, bias, log_sums, scale, causal)
        yield Sample(sample.id, (out_gradient, *call))
        out_gradient = out_gradient.clone()
        out_gradient[:, :, :-1] = 0
        yield Sample(f"{sample.id}, the last query alone", (out_gradient, *call))


def _fisher_linear_inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    for n, t, i, o in [
        (3, 7, 37, 53),
        (1, 1, 1, 1),
        (2, 33, 64, 128),
        (5, 1, 70, 19),
        (1, 16, 16, 200),
        (4, 15, 129, 65),
        (2, 17, 40, 24),
    ]:
        x, dy = _randn(generator, n, t, i).to(dtype), _randn(generator, n, t, o).to(dtype)
        yield Sample(f"N{n} T{t} I{i} O{o}", (torch.zeros(o, i), x, dy))
    n, t, i, o = 3, 10, 20, 30
    x, dy = _randn(generator, n, t, i).to(dtype), _randn(generator, n, t, o).to(dtype)
    start = torch.rand(o, i, generator=generator)
    yield Sample("adds to what is there", (start, x, dy))
    yield Sample("weighted samples, one dropped", (start, x, dy, torch.tensor([0.5, 0.0, 2.0])))
    yield Sample("no sample", (start, x[:0], dy[:0]))
    yield Sample("no token", (start, x[:, :0], dy[:, :0]))
    yield Sample("strided x and dy", (start, x.transpose(0, 1).contiguous().transpose(0, 1), dy.expand(n, t, o)))
    yield Sample("broadcast dy, stride 0", (start, x, dy[:, :1].expand(n, t, o)))
    scores, weight = torch.rand(n, generator=generator), torch.tensor([0.5, 0.0, 2.0])
    selected = torch.rand(o, i, generator=generator) < 0.3
    yield Sample("scores", (start, x, dy, None, scores))
    yield Sample("scores of selected entries, weights", (start, x, dy, weight, scores, selected))
    yield Sample("scores of single tokens", (start, x[:, :1], dy[:, :1], weight, scores, selected))
    yield Sample("nothing selected", (start, x, dy, None, scores, selected & ~selected))
    yield from _padded_inputs(generator, dtype)


def _padded_inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    """Samples of 37, 64, 20, 1 and no tokens of 64, and single tokens; x is not finite where dy is zero."""
    x, dy = _randn(generator, 5, 64, 48).to(dtype), _randn(generator, 5, 64, 80).to(dtype)
    for n, (first, end) in enumerate([(0, 37), (0, 64), (44, 64), (30, 31), (0, 0)]):
        for outside in (slice(0, first), slice(end, 64)):
            dy[n, outside], x[n, outside] = -0.0, float("nan")
    dy[1, 20:50] = 0  # no padding: between tokens that count
    fisher, scores = torch.zeros(80, 48), torch.zeros(5)
    selected = torch.rand(80, 48, generator=generator) < 0.5
    yield Sample("padding", (fisher, x, dy))
    yield Sample("padding, scores", (fisher, x, dy, None, scores))
    yield Sample(
        "padding, scores of selected entries", (fisher, x, dy, torch.rand(5, generator=generator), scores, selected)
    )
    yield Sample("padding on the left", (fisher, x[1:3], dy[1:3]))
    yield Sample("padding of single tokens", (fisher, x[:, 40:41], dy[:, 40:41]))


def _fisher_linears_inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    layers = [sample.args[:3] for sample in _fisher_linear_inputs(generator, dtype)]
    fishers, xs, dys = (list(tensors) for tensors in zip(*layers, strict=True))
    yield Sample("layers of many sizes", ([fisher.clone() for fisher in fishers], xs, dys))
    yield Sample("no layer", ([], [], []))


def _outer_at_inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    for n, t, a, b, k in [
        (3, 7, 37, 53, 100),
        (1, 1, 1, 1, 1),
        (2, 33, 64, 128, 37),
        (5, 1, 70, 19, 1330),
        (1, 300, 16, 20, 64),
        (4, 64, 9, 65, 3),
    ]:
        left, right = _randn(generator, n, t, a).to(dtype), _randn(generator, n, t, b).to(dtype)
        yield Sample(f"N{n} T{t} A{a} B{b} k{k}", (left, right, random_indices(a * b, k, generator)))
    left, right = _randn(generator, 3, 10, 20).to(dtype), _randn(generator, 3, 10, 30).to(dtype)
    indices = random_indices(600, 90, generator)
    yield Sample("int64 indices", (left, right, indices.long()))
    yield Sample("one row, one column", (left, right, torch.tensor([*range(60, 90), *range(95, 600, 30)])))
    yield Sample("no entry", (left, right, indices[:0]))
    yield Sample("no sample", (left[:0], right[:0], indices))
    yield Sample("no token", (left[:, :0], right[:, :0], indices))
    yield Sample(
        "transposed left and right",
        (left.mT.contiguous().mT, right.transpose(0, 1).contiguous().transpose(0, 1), indices),
    )
    yield Sample("broadcast left, stride 0", (left[:, :1].expand(3, 10, 20), right, indices))


def _selected_grad_inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    for m, i, o, k in [
        (7, 37, 53, 100),
        (1, 1, 1, 1),
        (33, 64, 128, 37),
        (300, 20, 16, 64),
        (70, 260, 65, 1000),
        (16, 19, 70, 1330),
        (40, 512, 16, 90),
    ]:
        x, dy = _randn(generator, m, i).to(dtype), _randn(generator, m, o).to(dtype)
        yield Sample(f"M{m} I{i} O{o} k{k}", (torch.zeros(k), x, dy, random_indices(o * i, k, generator)))
    x, dy = _randn(generator, 10, 30).to(dtype), _randn(generator, 10, 20).to(dtype)
    grad, indices = _randn(generator, 90), random_indices(600, 90, generator)
    yield Sample("adds to what is there, int64 indices", (grad, x, dy, indices.long()))
    yield Sample("packed indices", (grad, x, dy, pack(indices, 600)))
    yield from _packed_selected_grad_inputs(generator, dtype)
    yield Sample("one row, one column", (grad[:47], x, dy, torch.tensor([*range(60, 90), *range(95, 600, 30)])))
    yield Sample("first and last entry", (grad[:2], x, dy, torch.tensor([0, 599])))
    yield Sample("no entry", (grad[:0], x, dy, indices[:0]))
    yield Sample("no token", (grad, x[:0], dy[:0], indices))
    yield Sample("transposed x and dy", (grad, x.T.contiguous().T, dy.T.contiguous().T, indices))
    yield Sample("gaps between tokens", (grad, x.repeat(1, 2)[:, :30], dy.repeat(2, 1)[::2], indices))
    yield Sample("broadcast dy, stride 0", (grad, x, dy[:1].expand(10, 20), indices))
    yield Sample("one number for dy, strides 0", (grad, x, dy[:1, :1].expand(10, 20), indices))


def _packed_selected_grad_inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    x, dy = _randn(generator, 20, 300).to(dtype), _randn(generator, 20, 130).to(dtype)
    indices = random_indices(39000, 5000, generator)
    yield Sample("packed indices, 5 blocks", (torch.zeros(5000), x, dy, pack(indices, 39000)))
    some = indices[(indices // 8192 == 1) | (indices // 8192 == 3)]
    yield Sample("packed indices, empty blocks", (torch.zeros(len(some)), x, dy, pack(some, 39000)))
    yield Sample("no packed index", (torch.zeros(0), x, dy, pack(some[:0], 39000)))
    ends = torch.tensor([0, 8191, 8192, 38999])
    yield Sample("packed indices at ends of blocks", (torch.zeros(4), x, dy, pack(ends, 39000)))


def _fisher_segments_inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    i, o, rows = 37, 53, 41
    x, dy = _randn(generator, rows, i).to(dtype), _randn(generator, rows, o).to(dtype)
    offsets = torch.tensor([0, 3, 3, 20, 21, 41])
    slab, slabs = torch.rand(o, i, generator=generator), torch.rand(4, o, i, generator=generator)
    weight = torch.tensor([0.5, 3.0, 0.0, 2.0, 1.0])
    yield Sample("one slab, segments of 0 to 20 rows", (slab, x, dy, offsets))
    yield Sample("weighted segments, one dropped", (slab, x, dy, offsets, None, weight))
    yield Sample("sorted groups, one without segments", (slabs, x, dy, offsets, torch.tensor([0, 0, 1, 1, 3])))
    yield Sample("unsorted groups, weights", (slabs, x, dy, offsets, torch.tensor([2, 0, 3, 0, 2]), weight))
    yield Sample("rows outside of all segments", (slab, x, dy, torch.tensor([2, 20, 33])))
    yield Sample("no segment", (slabs, x, dy, offsets[:1], offsets[:0]))
    yield Sample("segments without rows", (slabs, x, dy, torch.tensor([7, 7, 7]), torch.tensor([1, 0])))
    yield Sample("no row", (slab, x[:0], dy[:0], torch.tensor([0, 0])))
    yield Sample("one row", (slab[:1, :1], x[:1, :1], dy[:1, :1], torch.tensor([0, 1])))
    yield Sample("strided x and dy", (slab, x.T.contiguous().T, dy[:, :1].expand(rows, o), offsets))
    x, dy = _randn(generator, 100, 130).to(dtype), _randn(generator, 100, 66).to(dtype)
    offsets = torch.tensor([0, 16, 33, 100])
    yield Sample("I130 O66", (torch.zeros(2, 66, 130), x, dy, offsets, torch.tensor([1, 0, 1])))
    x, dy = x[:, :128].contiguous(), dy[:, :64].contiguous()
    yield Sample("I128 O64", (torch.zeros(64, 128), x, dy, offsets))


def _topk_inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    scores = [torch.rand(shape, generator=generator).to(dtype) for shape in [(100,), (7, 13), (1,), (3, 5, 11)]]
    total = sum(score.numel() for score in scores)
    for k in (1, 2, 37, total - 1, total):
        yield Sample(f"k {k} of {total}", (scores, k))
    yield Sample("one tensor of many tiny values", ([torch.rand(70001, generator=generator).to(dtype) ** 8], 350))
    yield Sample("ties across tensors", ([torch.ones(10).to(dtype), torch.ones(10).to(dtype)], 13))
    yield Sample("ties at the threshold", ([torch.randint(0, 4, (5000,), generator=generator).to(dtype)] * 3, 4000))
    yield Sample("zeros of both signs", ([torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0]).to(dtype)], 3))
    yield Sample("negative", ([_randn(generator, 999).to(dtype)], 600))
    yield Sample("an empty tensor between", ([scores[0], scores[0][:0], scores[1]], 50))
    yield Sample("strided", ([_randn(generator, 30, 40).to(dtype).T, scores[0]], 77))


def _selected(generator: torch.Generator, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    params = [_randn(generator, *shape).to(dtype) for shape in [(53, 37), (129,), (1,), (8, 3, 5), (70001,), (16, 16)]]
    counts = [200, 129, 1, 0, 351, 5]
    indices = [random_indices(p.numel(), k, generator) for p, k in zip(params, counts, strict=True)]
    indices[-1] = indices[-1].long()
    for i in (0, 3, 4):
        indices[i] = pack(indices[i], params[i].numel())
    return params, indices


def _gather_inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    tensors, indices = _selected(generator, dtype)
    yield Sample("many tensors", (tensors, indices))
    yield Sample("no tensor", ([], []))
    plain = [positions(index, tensor.numel()) for tensor, index in zip(tensors, indices, strict=True)]
    yield Sample("no packed list", (tensors, plain))
    some = plain[4][(plain[4] // 8192 == 3) | (plain[4] // 8192 == 7)]
    yield Sample("a packed list with empty blocks", ([tensors[4]], [pack(some, 70001)]))
    yield Sample("all of a tensor, packed", ([tensors[4]], [pack(torch.arange(70001), 70001)]))
    mixed = [tensors[0], tensors[1].to(torch.bfloat16), tensors[2].to(torch.float16)]
    yield Sample("mixed dtypes", (mixed, indices[:3]))


def _delta_swap_inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    params, indices = _selected(generator, dtype)
    pairs = zip(params, indices, strict=True)
    values = [_randn(generator, count(index, param.numel())).to(dtype) for param, index in pairs]
    yield Sample("many tensors", (params, indices, values))
    yield Sample("no tensor", ([], [], []))


def _optimizer_inputs(op: str, generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    for call in optimizer_calls(op, generator, lambda: _selected(generator, dtype)):
        yield Sample(*call)
