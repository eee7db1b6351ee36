"""Prefixes of their own length in single layers, on transformers' attention interface. Source: arXiv 2101.00190.

peft's prefix tuning gives every layer of a model a prefix of one length, by way of the cache. Groups of a design space
have lengths of their own, or none. So peft's PrefixEncoder holds a layer's prefix, and the attention of that layer
puts it before its keys and values: behind the cache, which therefore works as without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_IMPLEMENTATION = "sparseft_prefix"


def check(model: Any, names: Iterable[str]) -> None:
    """Raise unless attentions of a model can take prefixes.

    Raises:
        ValueError: they are not transformers' with scaled_dot_product_attention.
    """
    found = {model.get_submodule(name).config._attn_implementation for name in names}
    if found != {"sdpa"} or not model._can_set_attn_implementation():
        raise ValueError(
            f"prefixes need a model of transformers with attn_implementation='sdpa', got {sorted(map(str, found))} in "
            f"{type(model).__name__}; load it with that, or leave P out of the space"
        )


def attach(model: Any, length: int, names: Iterable[str], heads: int, dim: int) -> None:
    """Give attentions prefixes: modules `prefix` of theirs, each with one weight [length, 2 * heads * dim].

    Args:
        model: of transformers; `check` it first.
        length: number of prefix tokens.
        names: of the attentions.
        heads: of keys and values.
        dim: features of a head.
    """
    from peft import PrefixEncoder, PrefixTuningConfig

    _register()
    config = PrefixTuningConfig(
        num_virtual_tokens=length, num_layers=1, token_dim=heads * dim, num_attention_heads=heads
    )
    for name in names:
        attention = model.get_submodule(name)
        like = next(attention.parameters())
        attention.prefix = PrefixEncoder(config).to(like.device, like.dtype)
        # an encoder and a decoder have configs of their own, which not every set_attn_implementation reaches
        attention.config._attn_implementation = _IMPLEMENTATION


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, **options: Any) -> Tensor | None:
        # a causal mask that is left to the kernel would be one of square attention
        found: Tensor | None = sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})
        return found

    AttentionInterface.register(_IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(_IMPLEMENTATION, mask)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """Attend to the prefix too. key, value: [samples, heads, tokens, dim]; the prefix is open to every query."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    prefix = getattr(module, "prefix", None)
    if prefix is not None:
        weight = prefix.embedding.weight
        length = len(weight)
        # [length, 2, heads, dim] -> two of [samples, heads, length, dim]
        pair = weight.view(length, 2, key.shape[1], key.shape[3]).to(key.dtype).permute(1, 2, 0, 3)
        causal = options.get("is_causal")
        if attention_mask is None and (getattr(module, "is_causal", False) if causal is None else causal):
            attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
            attention_mask = attention_mask.tril(key.shape[2] - query.shape[2])[None, None]
        key, value = (
            torch.cat([part.expand(len(key), -1, -1, -1), states], dim=2)
            for part, states in zip(pair, (key, value), strict=True)
        )
        if attention_mask is not None:
            open_to_all = 1.0 if attention_mask.dtype == torch.bool else 0.0
            attention_mask = F.pad(attention_mask, (length, 0), value=open_to_all)
        if options.get("position_bias") is not None:
            options["position_bias"] = F.pad(options["position_bias"], (length, 0))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
