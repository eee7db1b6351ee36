"""A small net, its masks and inputs, and optimizers of this and other packages, for tests of compact gradients."""

import pytest
import torch
from torch import nn

import sparseft


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 4)).to(dtype)


def mask_of(model, density=0.2, seed=0, **options):
    return sparseft.select("random", model, density=density, seed=seed, **options)


def inputs(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(10, 12, generator=generator).to(dtype)


OPTIMIZERS = {
    "SparseAdamW": lambda groups: sparseft.SparseAdamW(groups, lr=1e-2, weight_decay=0.1),
    "SparseSGD": lambda groups: sparseft.SparseSGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
    "SparseLion": lambda groups: sparseft.SparseLion(groups, lr=1e-3, weight_decay=0.1),
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW, foreach": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, foreach=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
}


every_optimizer = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def shapes_of(model):
    return {name: p.shape for name, p in model.named_parameters()}
