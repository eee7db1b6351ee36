"""What convolutions contribute: both ways to square it, against autograd, and what they keep in memory."""

import functools

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_same, assert_same_gradients
from models import full_precision, one_thread  # noqa: F401
from test_fisher_capture import Largest
from torch import nn

from sparseft import testing
from sparseft.fisher import estimate_fisher
from sparseft.fisher.patches import Patches, Window, add_by_sample_, add_unfolded_

N = 5

# size, kernel, rows of the weight, groups of each use; rows fewer and more than positions, which decides the way
SHAPES = [
    ((9,), (3,), 6, (1, 1)),
    ((6, 5), (3, 2), 6, (1, 1)),
    ((3, 3), (2, 2), 20, (1, 1)),
    ((5, 4, 3), (2, 2, 2), 8, (4, 4)),
    ((7,), (2,), 8, (2, 1)),
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
            window = Window((1 + use,) * axes, (use,) * axes, (1,) * axes, groups[use])
            x = torch.randn(N * frames, 2 * groups[use], *size, device=device)
            y = convolution(x.double(), weight, None, window.stride, window.padding, window.dilation, window.groups)
            dy = torch.randn(y.shape, device=device)
            losses = losses + (y * dy).view(N, -1).sum(1)
            parts.append(Patches(N, dy, x, kernel, window))
        grads = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses])
        fisher = torch.ones(weight.shape, device=device)
        add(fisher, parts)
        assert_same({"weight": fisher}, {"weight": 1 + grads.square().sum(0)})
        own = sum(part.gradient(2) for part in parts)
        assert_same_gradients({"weight": own}, {"weight": grads[2]})
        assert bool(parts[0].reaches().all())
        parts[0].image[:frames] = 0
        assert parts[0].reaches().tolist() == [False] + [True] * (N - 1)


def test_no_per_sample_gradients_of_a_convolution_are_kept():
    channels, samples = 48, 8
    model = nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten())
    model.append(nn.Linear(64 * 4, 3))
    with Largest() as largest:
        estimate_fisher(model, [(torch.randn(samples, channels, 4, 4), torch.arange(samples) % 3)], progress=False)
    assert largest.elements == model[2].weight.numel()
    # few positions: unfolded, they are a linear layer's tokens
    fisher, window = torch.zeros(64, 64, 3, 3), Window((1, 1), (0, 0), (1, 1), 1)
    patches = Patches(samples, torch.randn(samples, 64, 2, 2), torch.randn(samples, 64, 4, 4), (3, 3), window)
    with Largest() as largest:
        add_unfolded_(fisher, [patches])
    assert largest.elements == fisher.numel()
