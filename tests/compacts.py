"""For tests of compact gradients: a small net, its masks and inputs, optimizers, and what gradients should be."""

import copy

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


def assert_same_gradients(model, mask, loss, tolerance=1e-5):
    """The leaves get what autograd finds for the whole parameters of a copy, and these get nothing."""
    reference = copy.deepcopy(model)
    loss(reference).backward()
    dense = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in reference.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in dense.values())
    with sparseft.compact_gradients(model, mask) as compact:
        loss(model).backward()
        assert compact.entries.keys() == mask.keys()
        for name, leaf in compact.entries.items():
            index = mask[name].long().to(leaf.device)
            want = dense[name].reshape(-1)[index].float()
            got = torch.zeros_like(want) if leaf.grad is None else leaf.grad
            assert got.dtype == torch.float32
            scale = max(float(want.abs().max()), 1e-6 * largest)
            assert float((got - want).abs().max()) <= tolerance * scale, name
        whole = [name for name, p in model.named_parameters() if p.grad is not None and "selected/" not in name]
        assert whole == list(mask.dense)
