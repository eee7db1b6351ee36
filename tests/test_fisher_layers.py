"""Convolutions and norms over channels: every parameter against the loop of single samples, and the rule reported."""

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_exact
from models import full_precision, one_thread  # noqa: F401
from torch import nn
from torch.nn.utils import parametrizations

from sparseft import testing
from sparseft.fisher import estimate_fisher

N, C, CLASSES = 5, 4, 3
CONV = {"weight": "conv", "bias": "bias"}
NORM = {"weight": "norm", "bias": "bias"}

# layer -> size of its input, how to make it, the rule of each of its parameters
LAYERS = {
    "1d": ((9,), lambda: nn.Conv1d(C, 6, 3), CONV),
    "1d, everything": ((16,), lambda: nn.Conv1d(C, 6, 4, stride=3, padding=2, dilation=2, groups=2), CONV),
    "1d, same": ((9,), lambda: nn.Conv1d(C, 6, 4, padding="same", dilation=3), CONV),
    "2d": ((7, 5), lambda: nn.Conv2d(C, 6, 3), CONV),
    "2d, no bias": ((7, 5), lambda: nn.Conv2d(C, 6, 3, bias=False), {"weight": "conv"}),
    "2d, uneven": ((9, 8), lambda: nn.Conv2d(C, 6, (3, 2), stride=(2, 3), padding=(0, 1), dilation=(1, 2)), CONV),
    "2d, stride under the kernel": ((8, 7), lambda: nn.Conv2d(C, 6, 5, stride=2, padding=3), CONV),
    "2d, stride over the kernel": ((8, 7), lambda: nn.Conv2d(C, 6, 2, stride=3), CONV),
    "2d, patches": ((8, 7), lambda: nn.Conv2d(C, 6, 3, stride=3), CONV),
    "2d, one position": ((4, 3), lambda: nn.Conv2d(C, 6, (4, 3)), CONV),
    "2d, same": ((6, 5), lambda: nn.Conv2d(C, 6, (2, 3), padding="same"), CONV),
    "2d, valid": ((6, 5), lambda: nn.Conv2d(C, 6, (2, 3), padding="valid"), CONV),
    "2d, circular": ((6, 5), lambda: nn.Conv2d(C, 6, 3, padding=1, padding_mode="circular"), CONV),
    "2d, reflected": ((6, 5), lambda: nn.Conv2d(C, 6, 3, padding="same", padding_mode="reflect"), CONV),
    "2d, groups": ((6, 5), lambda: nn.Conv2d(C, 6, 3, groups=2, padding=1), CONV),
    "2d, depthwise": ((6, 5), lambda: nn.Conv2d(C, C, 3, groups=C, padding=1), CONV),
    "2d, depthwise, two each": ((6, 5), lambda: nn.Conv2d(C, 2 * C, 3, groups=C, stride=2), CONV),
    "2d, 1 x 1": ((6, 5), lambda: nn.Conv2d(C, 6, 1), CONV),
    "2d, 1 x 1, strided": ((6, 5), lambda: nn.Conv2d(C, 6, 1, stride=2), CONV),
    "3d": ((5, 4, 3), lambda: nn.Conv3d(C, 6, (3, 2, 1), stride=(2, 1, 1), padding=(1, 0, 1)), CONV),
    "1d, transposed": ((5,), lambda: nn.ConvTranspose1d(C, 6, 3, stride=2, padding=1, output_padding=1), CONV),
    "2d, transposed": ((4, 3), lambda: nn.ConvTranspose2d(C, 6, (3, 2), groups=2, dilation=(1, 2)), CONV),
    "3d, transposed": ((3, 2, 2), lambda: nn.ConvTranspose3d(C, 6, 2, stride=2), CONV),
    "2d, transposed, padded by a stride": (
        (4, 3),
        lambda: nn.ConvTranspose2d(C, 6, 2, stride=1, dilation=2, output_padding=1),
        {"weight": "fallback", "bias": "fallback"},
    ),
    "group norm": ((5, 3), lambda: nn.GroupNorm(2, C), NORM),
    "group norm without positions": ((), lambda: nn.GroupNorm(1, C), NORM),
    "instance norm": ((5, 3), lambda: nn.InstanceNorm2d(C, affine=True), NORM),
    "instance norm with running statistics": (
        (7,),
        lambda: nn.InstanceNorm1d(C, affine=True, track_running_stats=True),
        NORM,
    ),
    "batch norm": ((5, 3), lambda: nn.BatchNorm2d(C), NORM),
    "batch norm without positions": ((), lambda: nn.BatchNorm1d(C), NORM),
    "3d batch norm": ((2, 3, 2), lambda: nn.BatchNorm3d(C), NORM),
    "layer norm over everything": ((5, 3), lambda: nn.LayerNorm((C, 5, 3)), NORM),
}


class Enter(nn.Module):
    """Comes before the layer under test, so that its gradient at its input is looked at too.

    Not linear: a norm undoes a scale, so that the gradient of one would be nothing but rounding.
    """

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(C))

    def forward(self, x):
        return (x * self.gain.view(C, *[1] * (x.dim() - 2))).tanh()


def shaken(model):
    """Move parameters and running statistics far from their initial values."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor))
    return model


def around(layer, size):
    torch.manual_seed(0)
    model = nn.Sequential(Enter(), layer(), nn.Tanh(), nn.Flatten())
    model.append(nn.Linear(model.eval()(torch.randn(2, C, *size)).shape[1], CLASSES))
    return shaken(model)


def data(*size, samples=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *size, generator=generator)
    return x, torch.randint(0, CLASSES, (samples,), generator=generator)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_exact(name, device):
    size, layer, rules = LAYERS[name]
    model = around(layer, size).to(device)
    x, targets = data(C, *size)
    for batches in ([(x, targets)], [(x[:1], targets[:1]), (x[1:], targets[1:])]):
        report = assert_exact(model, batches).report
        assert {f"1.{parameter}": rule for parameter, rule in rules.items()}.items() <= report.rules.items()
        assert set(report.fallback) == {parameter for parameter, rule in report.rules.items() if rule == "fallback"}


@pytest.mark.parametrize("name", ["2d", "2d, depthwise", "group norm", "batch norm"])
@pytest.mark.parametrize("samples", [1, 3])
def test_other_memory_layouts(name, samples):
    size, layer, _ = LAYERS[name]
    model = around(layer, size).to(memory_format=torch.channels_last)
    x, targets = data(C, *size, samples=samples)
    assert not assert_exact(model, [(x.to(memory_format=torch.channels_last), targets)]).report.fallback


# the loop rounds each gradient to bf16, whose unit is 2**-8; what is squared here is not rounded
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize(
    "name", ["1d, everything", "2d", "2d, depthwise", "2d, transposed", "group norm", "batch norm"]
)
def test_other_dtypes(name, dtype, tolerance):
    size, layer, rules = LAYERS[name]
    model = around(layer, size).to(dtype)
    x, targets = data(C, *size)
    report = assert_exact(model, [(x.to(dtype), targets)], tolerance).report
    assert report.rules["1.weight"] == rules["weight"]


@pytest.mark.parametrize("name", ["2d", "2d, transposed", "group norm", "batch norm"])
def test_autocast_is_followed(name):
    size, layer, _ = LAYERS[name]
    model = around(layer, size)
    batch = data(C, *size)
    exact = estimate_fisher(model, [batch], progress=False)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    scores = assert_exact(model, [batch], 0.02)
    assert scores.report.rules == exact.report.rules
    assert any(not torch.equal(scores[parameter], value) for parameter, value in exact.items())


class Odd(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in {"enter": Enter(), **parts}.items():
            setattr(self, name, part)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.out(self.odd(self.enter(x)).flatten(2).mean(2))


class Twice(Odd):
    def odd(self, x):
        return self.last(self.conv(self.conv(x).tanh()).tanh())


class Shared(Odd):
    # one weight, two geometries: the gradients are added before they are squared
    def odd(self, x):
        y = F.conv2d(x, self.conv.weight, stride=2, padding=1).tanh().mean((2, 3), keepdim=True)
        return self.conv(x).tanh() * y


class SharedByGroups(Odd):
    def odd(self, x):
        y = F.conv2d(input=torch.cat([x, x.flip(1)], 1), weight=self.conv.weight, groups=2)
        return self.conv(x).tanh() + y.tanh()


class Frames(Odd):
    # [N, frames, ...] goes through the convolution as [N * frames, ...]
    def odd(self, x):
        frames = torch.stack([x, x.flip(3), x * 2], 1).flatten(0, 1)
        return self.norm(self.conv(frames)).tanh().view(len(x), 3, 6, -1).transpose(1, 2)


class FramesFirst(Odd):
    def odd(self, x):
        frames = torch.stack([x, x.flip(3), x * 2]).flatten(0, 1)
        return self.norm(self.conv(frames)).tanh().view(3, len(x), 6, -1).permute(1, 2, 0, 3)


class Squeezed(Odd):
    # as Mamba hands the weight of its convolution on
    def odd(self, x):
        weight = self.conv.weight.squeeze(1)
        return F.conv1d(x.flatten(2), weight.unsqueeze(1), self.conv.bias, groups=C).repeat(1, 2, 1)[:, :6]


class Computed(Odd):
    # a captured layer makes each sample's kernel
    def odd(self, x):
        kernels = self.make(x.mean((2, 3))).view(-1, 6, C, 1, 1)
        return torch.cat([F.conv2d(x[n : n + 1], kernels[n], self.bias) for n in range(len(x))])


USES = {
    "used twice": (
        lambda: Twice(conv=nn.Conv2d(C, C, 3, padding=1), last=nn.Conv2d(C, 6, 2)),
        {"conv.weight": "conv", "conv.bias": "bias"},
    ),
    "a shared weight": (lambda: Shared(conv=nn.Conv2d(C, 6, 3, dilation=2)), {"conv.weight": "conv"}),
    "a shared weight, other groups": (lambda: SharedByGroups(conv=nn.Conv2d(C, 6, 3)), {"conv.weight": "conv"}),
    "frames": (
        lambda: Frames(conv=nn.Conv2d(C, 6, 3), norm=nn.GroupNorm(3, 6)),
        {"conv.weight": "conv", "conv.bias": "bias", "norm.weight": "norm", "norm.bias": "bias"},
    ),
    "frames first": (
        lambda: FramesFirst(conv=nn.Conv2d(C, 6, 3), norm=nn.BatchNorm2d(6)),
        {"conv.weight": "fallback", "conv.bias": "fallback", "norm.weight": "fallback", "norm.bias": "fallback"},
    ),
    "a squeezed weight": (lambda: Squeezed(conv=nn.Conv1d(C, C, 3, groups=C)), {"conv.weight": "conv"}),
    "a kernel of each sample": (
        lambda: Computed(make=nn.Linear(C, 6 * C), bias=nn.Parameter(torch.randn(6))),
        {"make.weight": "linear", "bias": "fallback"},
    ),
    "weight norm": (
        lambda: Shared(conv=parametrizations.weight_norm(nn.Conv2d(C, 6, 3, dilation=2))),
        {"conv.parametrizations.weight.original0": "fallback", "conv.bias": "bias", "enter.gain": "elementwise"},
    ),
}


@pytest.mark.parametrize("case", USES)
def test_unusual_uses_are_exact_and_reported(case):
    torch.manual_seed(0)
    make, rules = USES[case]
    model = shaken(make())
    x, targets = data(C, 7, 6)
    for batches in ([(x, targets)], [(x[:1], targets[:1]), (x[1:], targets[1:])]):
        report = assert_exact(model, batches).report
        assert rules.items() <= report.rules.items(), report
        assert set(report.fallback) == {name for name, rule in report.rules.items() if rule == "fallback"}


@pytest.mark.parametrize("shape", [(C, 5), (C,)])
def test_batch_norm_with_the_statistics_of_the_batch_is_refused(shape):
    norm = nn.BatchNorm1d(C, track_running_stats=False)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(C * shape[-1] if len(shape) > 1 else C, CLASSES))
    with pytest.raises(ValueError, match="batch norm"):
        estimate_fisher(model, [data(*shape)], progress=False)
