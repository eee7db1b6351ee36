"""Modules that do something odd in their middle, and data for them."""

import torch
from torch import nn

N, T, H, C = 5, 6, 8, 3


class Net(nn.Module):
    """Embeds tokens, does something odd, classifies the mean."""

    def __init__(self, **parts):
        super().__init__()
        self.embed = nn.Embedding(11, H)
        self.out = nn.Linear(H, C)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, ids):
        return self.out(self.odd(self.embed(ids)).mean(1))


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def data(samples=N, length=T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (samples, length), generator=generator)
    return ids, torch.randint(0, C, (samples,), generator=generator)
