"""Heads: what a model predicts, and so which loss belongs to it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparseft.fisher.refusal import Refusal

# what the head of a transformers model predicts, by what its class is called
_HEADS = {
    "ForSequenceClassification": "sequence",
    "ForImageClassification": "sequence",
    "ForAudioClassification": "sequence",
    "ForVideoClassification": "sequence",
    "ForMultipleChoice": "classes",
    "ForCausalLM": "causal",
    "ForConditionalGeneration": "generation",
    "LMHeadModel": "causal",
    "ForMaskedLM": "tokens",
    "ForTokenClassification": "tokens",
}


def outputs_of(model: nn.Module, inputs: Any, labels: Tensor | None) -> Any:
    """Run the model. labels: what the decoder of an encoder-decoder model is fed with."""
    if not isinstance(inputs, Mapping):
        return model(inputs)
    accepted = inspect.signature(model.forward).parameters
    # a cache of keys and values would be kept through backward for nothing
    cache = {"use_cache": False} if "use_cache" in accepted else {}
    fed = {"labels": labels} if _head(headed(model)) == "generation" and _decodes(headed(model)) else {}
    return model(**{**cache, **inputs, **fed})


def logits_of(model: nn.Module, inputs: Any, labels: Tensor | None) -> Tensor:
    """Run the model; return its logits, fp32."""
    outputs = outputs_of(model, inputs, labels)
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise Refusal(
            f"the model must return logits (a tensor, or an output with .logits), got {type(logits).__name__}; "
            "pass `loss`, a function of (model, batch) that returns one loss a sample"
        )
    return logits.float()


def kind_of(model: nn.Module, logits: Tensor, labels: Tensor | None) -> str:
    """Return what the head predicts: "classes", "multilabel", "regression", "tokens" or "causal" (the next token)."""
    inner = headed(model)
    head = _head(inner)
    if head == "sequence":
        return _sequence_kind(inner, logits, labels)
    if head == "generation":
        return "tokens" if _decodes(inner) else "causal"
    if head is not None:
        return head
    classes = _classes(inner)
    if "PreTrainedModel" in classes:
        raise Refusal(
            f"no loss is known for {classes[0]}; pass `loss`, a function of (model, batch) that returns one loss "
            "a sample"
        )
    if labels is not None and labels.is_floating_point():
        return "regression"
    return "classes" if logits.dim() == 2 else "tokens"


def headed(model: nn.Module) -> nn.Module:
    """Return the model whose head it is: PEFT wraps it."""
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model  # type: ignore[operator]


def _classes(model: nn.Module) -> list[str]:
    return [cls.__name__ for cls in type(model).__mro__]


def _head(model: nn.Module) -> str | None:
    classes = _classes(model)
    return next((kind for head, kind in _HEADS.items() if any(head in name for name in classes)), None)


def _decodes(model: nn.Module) -> bool:
    # of a decoder alone, as of a vision-language model, the labels are those of the next token
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _sequence_kind(model: nn.Module, logits: Tensor, labels: Tensor | None) -> str:
    # the rule of transformers, without its writing the answer into the model's config
    kinds = {
        "regression": "regression",
        "single_label_classification": "classes",
        "multi_label_classification": "multilabel",
    }
    problem = getattr(model.config, "problem_type", None)
    if problem is not None:
        return kinds[problem]
    if logits.shape[-1] == 1:
        return "regression"
    return "classes" if labels is None or not labels.is_floating_point() else "multilabel"
