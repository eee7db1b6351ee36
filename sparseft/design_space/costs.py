"""What a strategy costs in a group of layers: weights for each unit of its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparseft.design_space.layers import Layer
from sparseft.selection.bitfit import is_bias


@dataclass(frozen=True)
class Cost:
    """Weights of a strategy: fixed + unit * size.

    Attributes:
        unit: weights of one more rank, prefix token or adapter neuron in all of the group's layers; 1 for an entry.
        names: the modules or parameters concerned.
        fixed: weights that do not depend on the size.
        most: the largest size that means anything; None without limit.
    """

    unit: int
    names: tuple[str, ...]
    fixed: int = 0
    most: int | None = None


class Costs:
    """Costs of strategies in one model."""

    def __init__(self, model: nn.Module, lora_targets: Sequence[str]):
        self._kind = type(model).__name__
        self._config = getattr(model, "config", None)
        self._targets = lora_targets
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def of(self, letter: str, layers: Sequence[Layer], letters: str, group: str) -> Cost:
        """Return the cost of a strategy in a group.

        Args:
            letter: the strategy.
            layers: of the group.
            letters: all strategies of the group.
            group: its name in messages.

        Raises:
            ValueError: the model does not have what the strategy needs.
        """
        names = [name for name in self._trainable if any(layer.owns(name) for layer in layers)]
        biases = [name for name in names if is_bias(name)]
        if letter == "S":
            free = tuple(name for name in names if "B" not in letters or name not in biases)
            return Cost(1, free, most=self._count(free))
        if letter == "B":
            if not biases:
                raise ValueError(
                    f"{group}: BitFit trains biases, and its layers of {self._kind} have none; leave B out"
                )
            return Cost(self._count(biases), tuple(biases))
        return {"L": self._lora, "P": self._prefix, "A": self._adapter}[letter](layers, group)

    def _count(self, names: Sequence[str]) -> int:
        return sum(self._trainable[name].numel() for name in names)

    def _lora(self, layers: Sequence[Layer], group: str) -> Cost:
        endings = tuple("." + target for target in self._targets)
        found = {
            name: tuple(module.weight.shape)
            for name, module in self._modules.items()
            if any(layer.owns(name) for layer in layers) and name.endswith(endings) and _is_linear(module)
        }
        if not found:
            raise ValueError(
                f"{group}: LoRA is attached to linear layers named {list(self._targets)}, and there are none; name "
                "them with lora_targets="
            )
        return Cost(sum(map(sum, found.values())), tuple(found), most=min(map(min, found.values())))

    def _prefix(self, layers: Sequence[Layer], group: str) -> Cost:
        names = tuple(self._attention(layer, group) for layer in layers)
        shapes = [heads_of(self._modules[name]) for name in names]
        return Cost(sum(2 * heads * dim for heads, dim in shapes), names)

    def _attention(self, layer: Layer, group: str) -> str:
        """Return the name of a layer's attention to itself: the first it has, before one to an encoder."""
        for name, module in self._modules.items():
            if layer.owns(name) and hasattr(module, "is_causal") and hasattr(module, "config"):
                return name
        raise ValueError(
            f"{group}: {layer.name} of {self._kind} has no attention that can take a prefix (transformers' attention "
            "interface); leave P out"
        )

    def _adapter(self, layers: Sequence[Layer], group: str) -> Cost:
        hidden = getattr(self._config, "hidden_size", None)
        if not isinstance(hidden, int):
            raise ValueError(f"{group}: an adapter's input has model.config.hidden_size features, and there is none")
        return Cost(len(layers) * (2 * hidden + 1), tuple(layer.name for layer in layers), fixed=len(layers) * hidden)


def heads_of(attention: Any) -> tuple[int, int]:
    """Return the number of key and value heads of an attention of transformers, and their width."""
    config = attention.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for attribute in ("head_dim", "attention_head_size", "key_value_proj_dim"):
        if isinstance(getattr(attention, attribute, None), int):
            return heads, getattr(attention, attribute)
    return heads, config.hidden_size // config.num_attention_heads


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)
