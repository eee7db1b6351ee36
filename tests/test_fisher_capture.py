"""Modules that use their parameters in unusual ways: the result is exact, and the report says what served them."""

import models
import pytest
import torch
import torch.nn.functional as F
from exactness import assert_exact
from models import one_thread  # noqa: F401
from nets import C, H, Net, T, data, parameter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparseft.fisher import batch_one_fisher, estimate_fisher


class Twice(Net):
    def odd(self, x):
        return torch.tanh(self.lin(torch.tanh(self.lin(x))))


class ByKeyword(Net):
    def odd(self, x):
        first, second = torch.chunk(input=self.packed, chunks=2)
        y = F.linear(input=x, weight=self.lin.weight, bias=self.lin.bias)
        y = torch.add(torch.mul(input=y, other=self.scale), other=first.view(-1))
        return torch.sub(y, other=torch.matmul(input=x, other=self.matrix), alpha=2) * torch.add(second, 1, alpha=2)


class UsedOutputAndNot(Net):
    def odd(self, x):
        self.lin(x * 2)
        return self.lin(x)


class PositionsWithoutBatch(Net):
    def odd(self, x):
        return x + self.pos(torch.arange(x.shape[1])) * self.scale


class PositionsOfOneRow(Net):
    def odd(self, x):
        return x * self.pos(torch.arange(x.shape[1])[None])


class FirstRowOfShared(Net):
    # expanding the ids to the batch changes nothing here but whose gradient it is
    def odd(self, x):
        return x + self.pos(torch.arange(x.shape[1])[None])[0]


class FirstCopy(Net):
    # every sample takes the first one's copy, and what a layer made of it
    def odd(self, x):
        copies = self.row.expand(len(x), -1)
        return x * copies[0] + self.lin(copies)[0]


class TimeMajor(Net):
    def odd(self, x):
        return self.norm(self.lin(x.transpose(0, 1)).relu()).transpose(0, 1)


class TimeMajorFlat(Net):
    def odd(self, x):
        flat = self.lin(x.transpose(0, 1).reshape(-1, H)).relu()
        return flat.view(x.shape[1], x.shape[0], H).transpose(0, 1)


class Flat(Net):
    def odd(self, x):
        return (self.norm(self.lin(x.reshape(-1, H))) * self.scale).view(x.shape)


class Reversed(Net):
    def odd(self, x):
        return self.lin(x.flip(0)).flip(0).relu()


class RawMatmul(Net):
    def odd(self, x):
        return x @ self.matrix


class MatmulFromTheLeft(Net):
    def odd(self, x):
        return self.matrix @ x


class ParameterAsData(Net):
    def odd(self, x):
        return x + self.lin(self.table).sum(0)


class OfParametersOnly(Net):
    def odd(self, x):
        return x * (self.scale * self.other)


class Convolution(Net):
    def odd(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.detach() @ weight.detach()

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight.T, x.flatten(0, 1).T @ dy.flatten(0, 1)


class HiddenUse(Net):
    # one use in sight, one that no torch function shows
    def odd(self, x):
        return Double.apply(self.lin(x), self.lin.weight)


class InPlace(Net):
    def odd(self, x):
        return self.norm(self.lin(x).mul_(2).relu_()).mul_(3)


class LinearAndElementwise(Net):
    def odd(self, x):
        return self.lin(x) + (self.lin.weight * x[:, :1]).mean(1, keepdim=True)


class Token(Net):
    def odd(self, x):
        cls = self.cls.expand(x.shape[0], -1, -1)
        return torch.cat([cls, x + self.positions, x - self.row, self.row.unsqueeze(0) + x], 1)


class Scalar(Net):
    def odd(self, x):
        return self.gain * x + self.shift


class OnePlus(Net):
    def odd(self, x):
        return F.rms_norm(x, (H,)) * (1.0 + self.weight.float()) + F.rms_norm(x, (H,), self.other)


class Sometimes(Net):
    # the second use comes with longer samples: it was not there when the model was probed
    def odd(self, x):
        y = self.lin(x)
        return self.lin(y.relu()) if x.shape[1] > T else y


class GathersAcrossSamples(Net):
    # as a mixture of experts does: the rows of one expert come from whichever samples chose it
    def odd(self, x):
        flat = x.reshape(-1, H)
        chosen = (flat[:, 0] > 0).nonzero()[:, 0]
        return flat.index_add(0, chosen, self.lin(flat[chosen])).view(x.shape)


class MultiHead(Net):
    def odd(self, x):
        return self.attention(x, x, x)[0]


class WithoutGrad(Net):
    def odd(self, x):
        with torch.no_grad():
            gain = self.lin(x).tanh()
        return x * gain


class ZeroInit(Net):
    # the adapter's first matrix has no gradient yet, as in LoRA
    def odd(self, x):
        return x + self.up(self.down(x))


def zero_init():
    up = nn.Linear(2, H, bias=False)
    nn.init.zeros_(up.weight)
    return ZeroInit(down=nn.Linear(H, 2, bias=False), up=up)


LINEAR, FELL = "linear", "fallback"
# module -> the rule that must serve each of its own parameters
CASES = {
    "linear used twice": (lambda: Twice(lin=nn.Linear(H, H)), {"lin.weight": LINEAR, "lin.bias": "bias"}),
    "called by keyword": (
        lambda: ByKeyword(lin=nn.Linear(H, H), packed=parameter(2, H), scale=parameter(H), matrix=parameter(H, H)),
        {"lin.weight": LINEAR, "lin.bias": "bias", "matrix": LINEAR, "scale": "data", "packed": "data"},
    ),
    "one use without output": (lambda: UsedOutputAndNot(lin=nn.Linear(H, H)), {"lin.weight": LINEAR}),
    "positions [T]": (
        lambda: PositionsWithoutBatch(pos=nn.Embedding(T, H), scale=parameter(H)),
        {"pos.weight": "embedding", "scale": "elementwise"},
    ),
    "positions [1, T]": (lambda: PositionsOfOneRow(pos=nn.Embedding(T, H)), {"pos.weight": "embedding"}),
    "row 0 of shared positions": (lambda: FirstRowOfShared(pos=nn.Embedding(T, H)), {"pos.weight": "embedding"}),
    "the first copy of an expanded parameter": (
        lambda: FirstCopy(row=parameter(H), lin=nn.Linear(H, H)),
        {"row": FELL, "lin.weight": FELL, "lin.bias": FELL},
    ),
    "time first": (
        lambda: TimeMajor(lin=nn.Linear(H, H), norm=nn.LayerNorm(H)),
        {"lin.weight": LINEAR, "lin.bias": "bias", "norm.weight": "norm"},
    ),
    "time first, flat": (lambda: TimeMajorFlat(lin=nn.Linear(H, H)), {"lin.weight": LINEAR, "lin.bias": "bias"}),
    "flat": (
        lambda: Flat(lin=nn.Linear(H, H), norm=nn.LayerNorm(H, bias=False), scale=parameter(H)),
        {"lin.weight": LINEAR, "norm.weight": "norm", "scale": "elementwise"},
    ),
    "samples reversed": (lambda: Reversed(lin=nn.Linear(H, H)), {"lin.weight": FELL}),
    "matmul": (lambda: RawMatmul(matrix=parameter(H, H)), {"matrix": LINEAR}),
    "matmul from the left": (lambda: MatmulFromTheLeft(matrix=parameter(T, T)), {"matrix": FELL}),
    "a parameter as data": (
        lambda: ParameterAsData(lin=nn.Linear(H, H), table=parameter(7, H)),
        {"lin.weight": LINEAR, "lin.bias": "bias", "table": "data"},
    ),
    "a product of parameters": (
        lambda: OfParametersOnly(scale=parameter(H), other=parameter(H)),
        {"scale": "data", "other": "data"},
    ),
    "convolution": (lambda: Convolution(conv=nn.Conv1d(H, H, 3, padding=1)), {"conv.weight": "conv"}),
    "a hidden use": (lambda: HiddenUse(lin=nn.Linear(H, H)), {"lin.weight": FELL, "lin.bias": "bias"}),
    "changed in place": (
        lambda: InPlace(lin=nn.Linear(H, H), norm=nn.LayerNorm(H)),
        {"lin.weight": LINEAR, "norm.bias": "bias"},
    ),
    "linear and elementwise": (lambda: LinearAndElementwise(lin=nn.Linear(H, H)), {"lin.weight": FELL}),
    "tokens and rows": (
        lambda: Token(cls=parameter(1, 1, H), positions=parameter(1, T, H), row=parameter(T, H)),
        {"cls": "elementwise", "positions": "elementwise", "row": "elementwise"},
    ),
    "scalars": (
        lambda: Scalar(gain=parameter(), shift=parameter(1)),
        {"gain": "elementwise", "shift": "elementwise"},
    ),
    "1 + weight": (
        lambda: OnePlus(weight=parameter(H), other=parameter(H)),
        {"weight": "elementwise", "other": "norm"},
    ),
    "tokens gathered": (lambda: GathersAcrossSamples(lin=nn.Linear(H, H)), {"lin.weight": FELL}),
    "multi-head attention": (
        lambda: MultiHead(attention=nn.MultiheadAttention(H, 2, batch_first=True)),
        {"attention.in_proj_weight": LINEAR, "attention.in_proj_bias": "bias", "attention.out_proj.weight": LINEAR},
    ),
    "without grad": (lambda: WithoutGrad(lin=nn.Linear(H, H)), {"lin.weight": "unused", "lin.bias": "unused"}),
    "zero-initialised adapter": (zero_init, {"down.weight": LINEAR, "up.weight": LINEAR}),
}


@pytest.mark.parametrize("case", CASES)
def test_unusual_uses_are_exact_and_reported(case):
    torch.manual_seed(0)
    make, rules = CASES[case]
    model = make()
    ids, targets = data()
    for batches in ([(ids, targets)], [(ids[:1], targets[:1]), (ids[1:], targets[1:])]):
        report = assert_exact(model, batches).report
        assert {name: report.rules[name] for name in rules} == rules, report
        assert report.rules["embed.weight"] == "embedding"
        assert set(report.fallback) == {name for name, rule in report.rules.items() if rule == FELL}


def test_a_use_that_appears_later_falls_back_for_that_batch():
    torch.manual_seed(0)
    model = Sometimes(lin=nn.Linear(H, H))
    batches = [data(2), data(4, T + 1, seed=1), data(3, seed=2)]
    report = assert_exact(model, batches).report
    assert report.rules["lin.weight"] == "fallback + linear"


def test_batches_of_other_lengths_keep_their_layout():
    torch.manual_seed(0)
    model = Flat(lin=nn.Linear(H, H), norm=nn.LayerNorm(H), scale=parameter(H))
    report = assert_exact(model, [data(3, 4), data(2, 7), data(1, 1), data(4, 5)]).report
    assert FELL not in report.rules.values()


def test_a_layout_that_no_gradient_showed_is_not_trusted():
    torch.manual_seed(0)
    model = TimeMajorFlat(lin=nn.Linear(H, H))
    ids, targets = data()
    # nothing is labelled in the batch that is probed
    report = assert_exact(model, [(ids, torch.full_like(targets, -100)), (ids, targets)]).report
    assert report.rules["lin.weight"] == FELL
    assert "no gradient reached it" in report.fallback["lin.weight"]


class TiedTwice(nn.Module):
    """An embedding with a padding id, looked up twice, that is also the head, applied twice."""

    def __init__(self, padding):
        super().__init__()
        self.embed = nn.Embedding(11, H, padding_idx=padding)
        with torch.no_grad():
            self.embed.weight.normal_()
        self.mix = nn.Linear(H, H)

    def forward(self, ids):
        x = self.mix(self.embed(ids)) + self.embed(ids.roll(1, 1))
        early = F.linear(x, self.embed.weight)
        return F.linear(torch.tanh(x), self.embed.weight) + early


@pytest.mark.parametrize("padding", [None, 3, -1])
def test_tied_weights_used_many_times(padding):
    torch.manual_seed(0)
    model = TiedTwice(padding)
    generator = torch.Generator().manual_seed(0)
    # the padding id is among the labels too, and tokens repeat within and across samples
    batches = [torch.randint(0, 11, (4, T, 2), generator=generator) for _ in range(2)]
    report = assert_exact(model, [(batch[..., 0], batch[..., 1]) for batch in batches]).report
    assert report.rules == {"embed.weight": "embedding + linear", "mix.weight": "linear", "mix.bias": "bias"}


def test_options_that_mix_samples_are_refused():
    for option in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        model = nn.Sequential(nn.Embedding(11, C, **option), nn.Flatten(), nn.Linear(T * C, C))
        with pytest.raises(ValueError, match=next(iter(option))):
            estimate_fisher(model, [data()], progress=False)


def test_sparse_embedding_gradients_are_exact():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, C, sparse=True), nn.Flatten(), nn.Linear(T * C, C))
    assert_exact(model, [data()])


def test_compiled_models_are_scored_uncompiled():
    torch.manual_seed(0)
    model = Twice(lin=nn.Linear(H, H))
    expected = estimate_fisher(model, [data()], progress=False)
    whole = torch.compile(model, backend="eager")
    inner = Twice(lin=torch.compile(nn.Linear(H, H), backend="eager"))
    inner.load_state_dict({name.replace("lin.", "lin._orig_mod."): p for name, p in model.state_dict().items()})
    for compiled in (whole, inner):
        scores = estimate_fisher(compiled, [data()], progress=False)
        for name, value in expected.items():
            got = scores[name if compiled is whole else name.replace("lin.", "lin._orig_mod.")]
            torch.testing.assert_close(got, value)


@pytest.mark.parametrize("name", ["bert", "llama tied", "t5", "deberta", "vit"])
def test_autocast_inside_the_model_is_followed(name):
    model, batch = models.make(name), models.batch(name)
    exact = estimate_fisher(model, [batch], progress=False)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    scores = estimate_fisher(model, [batch], progress=False)
    assert scores.report.rules == exact.report.rules
    largest = max(float(value.max()) for value in exact.values())
    for key, value in batch_one_fisher(model, [batch]).items():
        if value.max() > 1e-4 * largest:
            assert (scores[key] - value).norm() < 0.02 * value.norm(), key
    assert any(not torch.equal(scores[key], value) for key, value in exact.items())


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes, in elements of four bytes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return out


def test_no_per_sample_gradient_of_a_matrix_is_ever_made():
    vocabulary, width, samples = 512, 128, 8
    model = nn.Sequential(nn.Embedding(vocabulary, width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width))
    model.append(nn.Linear(width, vocabulary, bias=False))
    model[3].weight = model[0].weight
    ids = torch.randint(0, vocabulary, (samples, 4, 2))
    with Largest() as largest:
        estimate_fisher(model, [(ids[..., 0], ids[..., 1])], progress=False)
    # the largest tensor is a parameter's scores, not the per-sample gradients of even the smallest matrix
    assert largest.elements == vocabulary * width
    assert largest.elements < samples * 2 * width * width
