"""Convolutions and norms over channels: every parameter against the loop of single samples, and the rule reported."""

import functools

import pytest
import torch
import torch.nn.functional as F
from models import full_precision, one_thread  # noqa: F401
from test_fisher_capture import Largest
from torch import nn
from torch.nn.utils import parametrizations

from sparseft import testing
from sparseft.fisher import batch_one_fisher, estimate_fisher
from sparseft.fisher.patches import Patches, Window, add_by_sample_, add_unfolded_

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
    "group norm without positions": ((), lambda: nn.GroupNorm(2, C), NORM),
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
    """Comes before the layer under test, so that its gradient at its input is looked at too."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(C))

    def forward(self, x):
        return x * self.gain.view(C, *[1] * (x.dim() - 2))


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


def assert_exact(model, batches, tolerance=1e-5):
    scores = estimate_fisher(model, batches, progress=False)
    expected = batch_one_fisher(model, batches)
    assert scores.keys() == expected.keys()
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        error = float((scores[name] - value).abs().max()) / max(float(value.max()), 1e-9 * largest)
        assert error <= tolerance, f"{name}: error {error:.1e}"
    return scores


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_exact(name, device):
    size, layer, rules = LAYERS[name]
    model = around(layer, size).to(device)
    x, targets = data(C, *size)
    for batches in ([(x, targets)], [(x[:1], targets[:1]), (x[1:], targets[1:])]):
        report = assert_exact(model, batches, 1e-5 if device == "cpu" else 1e-4).report
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
    scores = assert_exact(model, [batch], 0.06)
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


class Computed(Odd):
    # a captured layer makes each sample's weight
    def odd(self, x):
        made = self.make(x.mean((2, 3)))
        return torch.cat([self.use(x[n : n + 1], made[n]) for n in range(len(x))])


def convolved(x, made, bias):
    return F.conv2d(x, made.view(6, C, 1, 1), bias)


def group_normed(x, made, bias):
    return F.group_norm(x, 2, made, bias)


def batch_normed(x, made, bias):
    return F.batch_norm(x, torch.zeros(6), torch.ones(6), made, bias)


def layer_normed(x, made, bias):
    return F.layer_norm(x.movedim(1, -1), (6,), made, bias).movedim(-1, 1)


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


@pytest.mark.parametrize("use", [convolved, group_normed, batch_normed, layer_normed])
def test_computed_weights_pass_their_gradient_on(use):
    torch.manual_seed(0)
    bias, channels = nn.Parameter(torch.randn(6)), C if use is convolved else 6
    model = Computed(enter=nn.Conv2d(C, channels, 1), make=nn.Linear(channels, 6 * C if use is convolved else 6))
    model.bias, model.use = bias, functools.partial(use, bias=bias)
    report = assert_exact(model, [data(C, 7, 6)]).report
    assert report.rules["make.weight"] == "linear"


@pytest.mark.parametrize("shape", [(C, 5), (C,)])
def test_batch_norm_with_the_statistics_of_the_batch_is_refused(shape):
    norm = nn.BatchNorm1d(C, track_running_stats=False)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(C * shape[-1] if len(shape) > 1 else C, CLASSES))
    with pytest.raises(ValueError, match="batch norm"):
        estimate_fisher(model, [data(*shape)], progress=False)


# one axis and three; positions fewer and more than rows of the weight, which decides how it is done
SHAPES = [
    ((9,), (3,), 6, 1),
    ((6, 5), (3, 2), 6, 1),
    ((3, 3), (2, 2), 20, 1),
    ((5, 4, 3), (2, 2, 2), 8, 4),
    ((7,), (2,), 8, 2),
]


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize(
    "add",
    [
        add_by_sample_,
        functools.partial(add_by_sample_, elements=1),
        add_unfolded_,
        functools.partial(add_unfolded_, elements=1),
    ],
)
@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize(("size", "kernel", "rows", "groups"), SHAPES)
def test_patches_add_up_to_squared_gradients(size, kernel, rows, groups, uses, add, device):
    torch.manual_seed(0)
    axes = len(size)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    for frames in (1, 3):
        weight = torch.randn(rows, 2, *kernel, device=device, dtype=torch.float64, requires_grad=True)
        parts, losses = [], torch.zeros(N, device=device, dtype=torch.float64)
        for use in range(uses):
            window = Window((1 + use,) * axes, (use,) * axes, (1,) * axes, groups)
            x = torch.randn(N * frames, 2 * groups, *size, device=device)
            y = convolution(x.double(), weight, None, window.stride, window.padding, window.dilation, groups)
            dy = torch.randn(y.shape, device=device)
            losses = losses + (y * dy).view(N, -1).sum(1)
            parts.append(Patches(N, dy, x, kernel, window))
        grads = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses])
        fisher = torch.ones(weight.shape, device=device)
        add(fisher, parts)
        torch.testing.assert_close(fisher.double(), 1 + grads.square().sum(0), rtol=1e-4, atol=1e-4)
        own = sum(part.gradient(2) for part in parts)
        torch.testing.assert_close(own.double(), grads[2], rtol=1e-4, atol=1e-4)
        assert bool(parts[0].reaches().all())
        parts[0].image[:frames] = 0
        assert parts[0].reaches().tolist() == [False] + [True] * (N - 1)


def test_no_per_sample_gradients_of_a_convolution_are_kept():
    channels, samples = 48, 8
    model = nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten())
    model.append(nn.Linear(64 * 4, CLASSES))
    with Largest() as largest:
        estimate_fisher(model, [data(channels, 4, 4, samples=samples)], progress=False)
    assert largest.elements == model[2].weight.numel()
    # few positions: unfolded, they are a linear layer's tokens
    fisher, window = torch.zeros(64, 64, 3, 3), Window((1, 1), (0, 0), (1, 1), 1)
    patches = Patches(samples, torch.randn(samples, 64, 2, 2), torch.randn(samples, 64, 4, 4), (3, 3), window)
    with Largest() as largest:
        add_unfolded_(fisher, [patches])
    assert largest.elements == fisher.numel()
