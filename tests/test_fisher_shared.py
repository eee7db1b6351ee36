"""What all samples share, layouts that are not batch-first, and multi-head attention: exact, and captured."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_exact, assert_same
from models import one_thread  # noqa: F401
from nets import C, H, N, Net, T, data, parameter
from torch import nn

from sparseft import testing
from sparseft.fisher import batch_one_fisher, estimate_fisher, sample_gradients
from sparseft.fisher.capture import Capture


def scores_of(x):
    return x @ x.transpose(1, 2) / 3


class RelativeBias(Net):
    # as in T5: one bias, added to the scores of every layer, in a matrix that other tokens of the sample look up too
    def odd(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        bias = self.pos(places[:, None] - places + T).permute(2, 0, 1).unsqueeze(0)
        scores = scores_of(x).unsqueeze(1) + bias
        mixed = torch.matmul(scores.softmax(-1), x.unsqueeze(1)).sum(1)
        again = torch.matmul((scores_of(mixed).unsqueeze(1) + bias).softmax(-1), mixed.unsqueeze(1))
        return again.mean(1)


class BiasInAttention(Net):
    # as the mask of a fused attention, with a mask of the batch or without
    def odd(self, x):
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        bias = self.table[:, : x.shape[1], : x.shape[1]].unsqueeze(0)
        if self.masked:
            bias = torch.where(x.detach()[:, None, None, :, 0] > 0, bias, -3.0)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=bias).transpose(1, 2).flatten(2)


class SharedThroughLayers(Net):
    # as in DeBERTa: a table goes through a norm and through layers that the tokens go through too
    def odd(self, x):
        table = self.lin(F.dropout(self.norm(self.pos.weight), 0.5, self.training)[:5].unsqueeze(0)).tanh()
        keys = table.repeat(x.shape[0], 1, 1)
        return torch.bmm(torch.bmm(self.lin(x), keys.transpose(1, 2)).softmax(-1), keys)


class Repeated(Net):
    def odd(self, x):
        more = torch.cat([self.first.expand(len(x), -1, -1), (self.second * 2).repeat(len(x), 2, 1)], 1)
        return torch.cat([more, x, (self.first * self.second).expand_as(x)], 1)


class TimeMajorRepeated(Net):
    def odd(self, x):
        y = x.transpose(0, 1)
        tail = (self.first * 1).repeat(1, y.shape[1], 1)
        return torch.cat([y + self.pos(torch.arange(len(y), device=x.device))[:, None], tail]).transpose(0, 1)


class Windows(Net):
    # as in Swin: windows of a sample follow each other in the first dimension
    def odd(self, x):
        windows = x.reshape(-1, 2, H)
        bias = self.table[torch.tensor([[0, 1], [2, 0]], device=x.device)]
        return torch.matmul((scores_of(windows) + bias).softmax(-1), windows).view(x.shape)


class ChangedInPlace(Net):
    def odd(self, x):
        shared = self.scale * self.other
        early = x + shared
        shared.mul_(3)
        early += shared
        return early * (1 / shared)


class GivenTheBatch(Net):
    # a shared tensor that takes in the batch is shared no longer
    def odd(self, x):
        shared = (self.scale * self.other).repeat(x.shape[1], 1)
        shared[1] = x[0, 0]
        return x + shared.sum(0) * 0 + shared[0]


class Computed(Net):
    # a weight that is itself computed, in a place that all samples share
    def odd(self, x):
        table = F.layer_norm(self.table, (H,), self.scale * self.other, self.shift)
        return x + F.linear(table, torch.outer(self.scale, self.other), self.shift).sum(0)


class Large(Net):
    # too large to form its gradient for every sample
    def odd(self, x):
        return x + (self.table * 2).mean(0)


class Unsized(Net):
    # a number has no say in the precision of a result, and must not get one
    def odd(self, x):
        y = x * (self.gain * self.other) + torch.where(x > 0, self.gain * 2, x)
        assert y.dtype == torch.float32
        return y


class LookedAt(Net):
    # what is computed from the weight beside its use changes nothing
    def odd(self, x):
        self.seen = self.lin.weight.norm() + self.pos.weight.T.sum()
        return self.lin(x) + self.pos(torch.arange(x.shape[1], device=x.device))


class FirstTokenOfTimeMajor(Net):
    # the rows that matter are the first N of T * N, where a batch that lies sample after sample has its first sample
    def odd(self, x):
        flat = self.lin(x.transpose(0, 1).reshape(-1, H)).relu()
        return flat.view(x.shape[1], x.shape[0], H).transpose(0, 1)[:, :1]


class Attention(Net):
    def odd(self, x):
        y = x if self.attention.batch_first else x.transpose(0, 1)
        key, value, options = self.arguments(y)
        z, weights = self.attention(y, key, value, **options)
        z = z if self.attention.batch_first else z.transpose(0, 1)
        return z if weights is None else z + weights.sum(-1, keepdim=True)


def attention(arguments, **options):
    net = Attention(attention=nn.MultiheadAttention(H, 2, **options))
    net.arguments = arguments
    return net


def masked(y):
    padding = torch.zeros(y.shape[1], len(y), dtype=torch.bool, device=y.device)
    padding[:, -1] = True
    causal = torch.ones_like(padding[0]).expand(len(y), -1).triu(1)
    return y, y, {"key_padding_mask": padding, "attn_mask": causal, "need_weights": False}


class Layers(Net):
    def odd(self, x):
        y = x if self.first else x.transpose(0, 1)
        z = self.layers(y, y.flip(0 if not self.first else 1)) if self.decoder else self.layers(y)
        return z if self.first else z.transpose(0, 1)


def layers(first, decoder):
    options = {"dim_feedforward": 12, "batch_first": first, "activation": "gelu", "norm_first": first}
    if decoder:
        stack = nn.TransformerDecoder(nn.TransformerDecoderLayer(H, 2, **options), 2)
    else:
        stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(H, 2, **options), 2, enable_nested_tensor=False)
    net = Layers(layers=stack)
    net.first, net.decoder = first, decoder
    return net


class CutPacked(Net):
    # rows of one matrix, some twice; of another, rows that overlap
    def odd(self, x):
        a, b = self.packed.split([3, H - 3])
        x = x + F.pad(F.linear(x, a), (0, H - 3)) + F.pad(F.linear(F.linear(x, a), b[:, :3] * 1), (0, 3))
        c, d = self.lin.weight.chunk(2)
        return x + F.pad(F.linear(x, c), (0, H // 2)) + F.pad(F.linear(x, d), (0, H // 2)) * F.linear(x, self.whole)


class CutOverlapping(Net):
    def odd(self, x):
        blocks = [*self.packed.split([3, H - 3]), *self.packed.chunk(2)]
        outer = torch.cat([F.linear(x, rows) for rows in blocks], -1)
        whole, (head, _) = F.linear(x, self.lin.weight), self.lin.weight.chunk(2)
        return x + outer[..., :H] * outer[..., H:] + whole * F.pad(F.linear(x, head), (H // 2, 0))


class CutReshaped(Net):
    # the rows cut are not those of the parameter
    def odd(self, x):
        first, second = self.table.view(2, 2 * H).split(1)
        flat = x.flatten(1)[:, : 2 * H] * first - second
        return torch.cat([x, flat.view(-1, 2, H)], 1)


class FirstCopyOfShared(Net):
    def odd(self, x):
        copies = (self.row * self.scale).expand(len(x), -1)
        return x * copies[0]


class Does(Net):
    def odd(self, x):
        return self.does(self, x)


def does(function, **parts):
    net = Does(**parts)
    net.does = function
    return net


def bias_in_attention(masks):
    net = BiasInAttention(table=parameter(2, T, T))
    net.masked = masks
    return net


FELL = "fallback"
# module -> the rules that must serve its own parameters; all others must be captured too
CASES = {
    "a relative bias": (lambda: RelativeBias(pos=nn.Embedding(2 * T, 2)), {"pos.weight": "embedding"}),
    "a bias in fused attention": (lambda: bias_in_attention(False), {"table": "data"}),
    "a bias under the batch's mask": (lambda: bias_in_attention(True), {"table": "data"}),
    "a table through layers": (
        lambda: SharedThroughLayers(lin=nn.Linear(H, H), norm=nn.LayerNorm(H), pos=nn.Embedding(7, H)),
        {"lin.weight": "linear", "lin.bias": "bias", "norm.weight": "norm", "pos.weight": "data"},
    ),
    "repeated": (
        lambda: Repeated(first=parameter(1, 1, H), second=parameter(1, 1, H)),
        {"second": "data"},
    ),
    "repeated, time first": (
        lambda: TimeMajorRepeated(first=parameter(1, 1, H), pos=nn.Embedding(T, H)),
        {"first": "data", "pos.weight": "embedding"},
    ),
    "windows": (lambda: Windows(table=parameter(3)), {"table": "data"}),
    "changed in place": (lambda: ChangedInPlace(scale=parameter(H), other=parameter(H)), {"scale": "data"}),
    "given the batch": (lambda: GivenTheBatch(scale=parameter(H), other=parameter(H)), {"scale": FELL, "other": FELL}),
    "computed weights": (
        lambda: Computed(table=parameter(3, H), scale=parameter(H), other=parameter(H), shift=parameter(H)),
        {"table": "data", "scale": "data", "other": "data", "shift": "data"},
    ),
    "numbers": (
        lambda: Unsized(gain=nn.Parameter(torch.tensor(1.5).double()), other=nn.Parameter(torch.tensor(0.7).double())),
        {"gain": "data", "other": "data"},
    ),
    "looked at": (
        lambda: LookedAt(lin=nn.Linear(H, H), pos=nn.Embedding(T, H)),
        {"lin.weight": "linear", "pos.weight": "embedding"},
    ),
    "the first token, time first": (lambda: FirstTokenOfTimeMajor(lin=nn.Linear(H, H)), {"lin.weight": "linear"}),
    "too large to form": (lambda: Large(table=parameter(2**17 + 1, H)), {"table": FELL}),
    "attention": (
        lambda: attention(lambda y: (y, y, {}), batch_first=True),
        {
            "attention.in_proj_weight": "linear",
            "attention.in_proj_bias": "bias",
            "attention.out_proj.weight": "linear",
        },
    ),
    "attention, time first, masked": (lambda: attention(masked), {"attention.in_proj_weight": "linear"}),
    "attention to others": (
        lambda: attention(lambda y: (y.tanh(),) * 2 + ({},)),
        {"attention.in_proj_weight": "linear", "attention.in_proj_bias": "bias"},
    ),
    "attention to two others": (
        lambda: attention(lambda y: (y.tanh(), y.sin(), {}), bias=False),
        {"attention.in_proj_weight": "linear"},
    ),
    "attention of several widths": (
        lambda: attention(lambda y: (y[..., :5], y[..., 1:4], {}), kdim=5, vdim=3, batch_first=True),
        {"attention.q_proj_weight": "linear", "attention.v_proj_weight": "linear"},
    ),
    "attention with a key of its own": (
        lambda: attention(lambda y: (y, y, {}), add_bias_kv=True),
        {"attention.bias_k": "data", "attention.bias_v": "data"},
    ),
    "encoder": (lambda: layers(True, False), {"layers.layers.0.self_attn.in_proj_weight": "linear"}),
    "encoder, time first": (lambda: layers(False, False), {"layers.layers.0.norm1.weight": "norm"}),
    "decoder": (lambda: layers(True, True), {"layers.layers.0.multihead_attn.in_proj_weight": "linear"}),
    "decoder, time first": (lambda: layers(False, True), {"layers.layers.1.multihead_attn.in_proj_bias": "bias"}),
    "learned queries": (
        lambda: does(
            lambda net, x: net.attention(net.queries.expand(len(x), -1, -1), x, x)[0],
            attention=nn.MultiheadAttention(H, 2, batch_first=True),
            queries=parameter(1, 3, H),
        ),
        {"attention.in_proj_weight": "linear", "queries": "elementwise"},
    ),
    "attention among parameters": (
        lambda: does(
            lambda net, x: x + net.attention(net.queries, net.queries, net.queries)[0].mean(0),
            attention=nn.MultiheadAttention(H, 2),
            queries=parameter(3, H),
        ),
        {"attention.in_proj_weight": "linear", "attention.out_proj.bias": "bias", "queries": "data"},
    ),
    "positions resized": (
        lambda: does(
            lambda net, x: x + F.interpolate(net.grid, size=x.shape[1], mode="linear").mT, grid=parameter(1, H, 4)
        ),
        {"grid": "data"},
    ),
    "activated scales": (
        lambda: does(
            lambda net, x: net.shift - x * F.softplus(net.gain) / (net.shift.exp() + 1),
            gain=parameter(H),
            shift=parameter(1),
        ),
        {"gain": "data", "shift": "data + elementwise"},
    ),
    "a weight put together": (
        lambda: does(
            lambda net, x: F.linear(x, net.whole + net.down @ net.up),
            whole=parameter(H, H),
            down=parameter(H, 2),
            up=parameter(2, H),
        ),
        {"whole": FELL, "down": FELL, "up": FELL},
    ),
    "an unknown operation": (
        lambda: does(lambda net, x: torch.lerp(x, x.tanh(), net.gain.sigmoid()), gain=parameter(H)),
        {"gain": FELL},
    ),
    "written into the batch": (
        lambda: does(
            lambda net, x: torch.select_scatter(x, net.row.expand_as(x[:, 0]) * net.gain, 1, 0),
            row=parameter(H),
            gain=parameter(H),
        ),
        {"row": "data", "gain": "elementwise"},
    ),
    "rows that overlap": (
        lambda: CutOverlapping(packed=parameter(H, H), lin=nn.Linear(H, H, bias=False)),
        {"packed": FELL, "lin.weight": FELL},
    ),
    "rows of another shape": (lambda: CutReshaped(table=parameter(4, H)), {"table": "data"}),
    "the first copy of a shared tensor": (
        lambda: FirstCopyOfShared(row=parameter(H), scale=parameter(H)),
        {"row": FELL, "scale": FELL},
    ),
    "rows of one matrix": (
        lambda: CutPacked(packed=parameter(H, H), lin=nn.Linear(H, H, bias=False), whole=parameter(H, H)),
        {"packed": FELL, "lin.weight": "linear", "whole": "linear"},
    ),
}


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("case", CASES)
def test_shared_tensors_and_attention_are_captured_and_exact(case, device):
    torch.manual_seed(0)
    make, rules = CASES[case]
    model = make().to(device)
    ids, targets = data()
    for batches in ([(ids, targets)], [(ids[:1], targets[:1]), (ids[1:], targets[1:])]):
        report = assert_exact(model, batches).report
        assert {name: report.rules[name] for name in rules} == rules, report
        assert set(report.fallback) == {name for name, rule in rules.items() if rule == FELL}


@pytest.mark.parametrize("case", ["a table through layers", "attention to others", "decoder, time first"])
def test_other_lengths_and_chosen_entries_of_a_packed_weight(case):
    torch.manual_seed(0)
    model = CASES[case][0]()
    batches = [data(3, 4), data(2, 7), data(1, 1)]
    assert not assert_exact(model, batches).report.fallback
    generator = torch.Generator().manual_seed(0)
    chosen = {
        name: torch.rand(weight.numel(), generator=generator).lt(0.4).nonzero()[:, 0]
        for name, weight in model.named_parameters()
    }
    found = sample_gradients(model, batches, chosen, progress=False)
    scores = estimate_fisher(model, batches, progress=False)
    expected = {name: scores[name].flatten()[index] for name, index in chosen.items()}
    assert_same({name: rows.square().mean(0) for name, rows in found.items()}, expected)


def test_the_expected_fisher_pulls_back_once_for_every_label():
    torch.manual_seed(0)
    model = CASES["a table through layers"][0]()
    ids, _ = data()
    scores = estimate_fisher(model, [ids], mode="expected", progress=False)
    probabilities = model.eval()(ids).softmax(-1).detach()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(N):
        for label in range(C):
            model.zero_grad()
            F.cross_entropy(model(ids[n : n + 1]), torch.tensor([label])).backward()
            for name, p in model.named_parameters():
                total[name] += probabilities[n, label] * p.grad**2 / N
    assert_same(scores, total)


def test_nothing_is_held_when_the_pass_is_over(monkeypatch):
    seen = []
    original = Capture.__init__

    def noted(self, *args):
        original(self, *args)
        seen.append(weakref.ref(self))

    monkeypatch.setattr(Capture, "__init__", noted)
    torch.manual_seed(0)
    model = CASES["a table through layers"][0]()
    gc.collect()
    gc.disable()
    try:
        estimate_fisher(model, [data(), data()], progress=False)
        assert len(seen) == 4  # the probe's two, and one a batch
        assert not any(capture() is not None for capture in seen)
    finally:
        gc.enable()


class NormedFirst(nn.Module):
    # the first thing that happens to the input is in no rule's reach: a convolution whose weight is computed
    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3))
        self.second, self.last = nn.Conv1d(4, 4, 3), nn.Linear(4 * 6, C)

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()).flatten(1))


class MaskedFirst(nn.Module):
    # inputs without gradients on their way to a parameter, through operations that no rule knows
    def __init__(self):
        super().__init__()
        self.table, self.last = parameter(5, 4), nn.Linear(4, C)

    def forward(self, x):
        kept = x.flatten(1)[:, :5].gt(0).float().cumsum(1)
        return self.last(torch.einsum("ni,ij->nj", kept, self.table).tanh())


@pytest.mark.parametrize(
    ("net", "slow"),
    [
        (NormedFirst, {"first.bias", *(f"first.parametrizations.weight.original{i}" for i in range(2))}),
        (MaskedFirst, {"table"}),
    ],
)
def test_what_follows_an_uncaptured_first_operation_is_of_the_batch(net, slow):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = net()
    x, labels = torch.randn(6, 3, 10, generator=generator), torch.randint(0, C, (6,), generator=generator)
    scores = estimate_fisher(model, [(x[:4], labels[:4]), (x[4:], labels[4:])], progress=False)
    assert set(scores.report.fallback) == slow
    assert_same(scores, batch_one_fisher(model, [(x, labels)]))
