"""What the tests of optimizers share: a small net with index lists, a training loop, and torch's own optimizers."""

import torch

import sparseft.testing
from sparseft import optim
from sparseft.index_lists import positions


class Lion(torch.optim.Optimizer):
    """Lion as its paper has it, arXiv 2302.06675, algorithm 2: torch has none."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                grad = -param.grad if group["maximize"] else param.grad
                mean = self.state[param].setdefault("mean", torch.zeros_like(param))
                update = torch.sign(beta1 * mean + (1 - beta1) * grad)
                mean.copy_(beta2 * mean + (1 - beta2) * grad)
                param -= group["lr"] * (update + group["weight_decay"] * param)


PLAIN = {
    "adamw": {"lr": 0.05, "weight_decay": 0.1},
    "lion": {"lr": 0.02, "weight_decay": 0.1},
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
}
SHARED = {
    "decay to the pretrained": {"decay_to": "pretrained"},
    "clipping": {"max_norm": 0.05},
    "stochastic rounding": {"rounding": "stochastic", "seed": 5},
    "states in 8 bits": {"state_bits": 8},
}
# each optimizer by itself, and with each option that all of them have
OPTIONS = {name: PLAIN[name] for name in PLAIN}
OPTIONS |= {f"{name}, {case}": {**PLAIN[name], **extra} for name in PLAIN for case, extra in SHARED.items()}
OPTIMIZERS = {case: optim.OPTIMIZERS[case.partition(",")[0]] for case in OPTIONS}
TORCH = {"adamw": torch.optim.AdamW, "lion": Lion, "sgd": torch.optim.SGD}


def model_and_groups(dtype=torch.float32, device="cpu"):
    """A small net, a tenth of its weights in index lists, one of them above 256."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3)).to(device, dtype)
    generator = torch.Generator().manual_seed(1)
    indices = []
    for parameter in model.parameters():
        k = max(1, parameter.numel() // 10)
        indices.append(sparseft.testing.random_indices(parameter.numel(), k, generator).to(device))
    indices[0][-1] = 1190
    return model, [{"params": list(model.parameters()), "indices": indices}]


def parameters_and_positions(model, groups):
    """Yield each parameter and where its selected entries are: an optimizer packs the lists of its groups."""
    for parameter, index in zip(model.parameters(), groups[0]["indices"], strict=True):
        yield parameter, positions(index, parameter.numel())


def train(model, optimizer, steps, seed=0, scheduler=None):
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    for _ in range(steps):
        x = torch.randn(16, 40, generator=generator).to(parameter)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
