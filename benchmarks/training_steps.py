"""One training step in every way that is compared: what trains, its gradients, its update.

Each function prepares a model of its own and returns the step to time. Those of `peft` are written after its
documentation; their rank is the one whose number of weights is nearest to the density's, and at least one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import sparseft
from sparseft import products

Batch = dict[str, Tensor]
Step = Callable[[Batch], None]
LR = 1e-5


def full(model: nn.Module, density: float) -> Step:
    """Train everything with torch's fused AdamW."""
    return step(model, torch.optim.AdamW(model.parameters(), lr=LR, fused=True))


def input_gradients(model: nn.Module, density: float) -> Step:
    """Train nothing: forward, and the backward pass down to the embeddings. What every way must do."""
    model.requires_grad_(False)
    embed = model.get_input_embeddings()

    def run(batch: Batch) -> None:
        embedded = embed(batch["input_ids"]).requires_grad_()
        model(inputs_embeds=embedded, **{key: batch[key] for key in batch if key != "input_ids"}).loss.backward()

    return run


def compact(model: nn.Module, density: float) -> Step:
    """Train random entries of the linear layers with compact gradients."""
    mask = random_mask(model, density)
    sparseft.compact_gradients(model, mask).__enter__()
    return step(model, sparseft.SparseAdamW(mask.param_groups(model), lr=LR))


def compact_torch_products(model: nn.Module, density: float) -> Step:
    """Do the same, with dense products by the library that torch itself chooses, as all others here have them."""
    step = compact(model, density)

    def run(batch: Batch) -> None:
        chosen, products.prefer_onednn = products.prefer_onednn, lambda: False
        try:
            step(batch)
        finally:
            products.prefer_onednn = chosen

    return run


def dense_gradients(model: nn.Module, density: float) -> Step:
    """Train the same entries with ordinary gradients, of which the sparse optimizer takes what it needs."""
    mask = random_mask(model, density)
    mask.freeze_rest(model)
    return step(model, sparseft.SparseAdamW(mask.param_groups(model), lr=LR))


def lora(model: nn.Module, density: float) -> Step:
    """Train peft's LoRA on the same layers."""
    from peft import LoraConfig

    return _peft(model, LoraConfig(r=rank(model, density), target_modules=list(linears(model)), lora_dropout=0.0))


def shira(model: nn.Module, density: float) -> Step:
    """Train peft's SHiRA on the same layers."""
    from peft import ShiraConfig

    return _peft(model, ShiraConfig(r=rank(model, density), target_modules=list(linears(model)), random_seed=0))


def supertuning(model: nn.Module, density: float) -> Step:
    """Train peft's Super-Tuning on the same layers."""
    from peft import SupertuningConfig

    return _peft(model, SupertuningConfig(sparsity=1 - density, target_modules=list(linears(model))))


STEPS: dict[str, Callable[[nn.Module, float], Step]] = {
    function.__name__: function
    for function in (
        full,
        input_gradients,
        compact,
        compact_torch_products,
        dense_gradients,
        lora,
        shira,
        supertuning,
    )
}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers that train, by name: all inside the transformer's blocks."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if ".layer" in name}


def rank(model: nn.Module, density: float) -> int:
    """Return the rank at which LoRA has the number of weights nearest to a density's."""
    layers = linears(model).values()
    entries = sum(layer.weight.numel() for layer in layers)
    return max(1, round(density * entries / sum(sum(layer.weight.shape) for layer in layers)))


def trained(model: nn.Module) -> int:
    """Return the number of weights that a prepared model trains."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def random_mask(model: nn.Module, density: float) -> sparseft.Mask:
    """Return a mask of random entries of the linear layers."""
    return sparseft.select(
        "random", model, density=density, include=[f"{each}.weight" for each in linears(model)], progress=False
    )


def _peft(model: nn.Module, config: object) -> Step:
    from peft import get_peft_model

    wrapped = get_peft_model(model, config)
    trainable = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    return step(wrapped, torch.optim.AdamW(trainable, lr=LR, fused=True))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def run(batch: Batch) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run
