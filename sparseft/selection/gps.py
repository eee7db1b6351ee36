"""GPS: the inputs of each neuron with the largest gradients. Source: arXiv 2312.10136."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseft.fisher.batches import size
from sparseft.fisher.heads import headed, outputs_of
from sparseft.fisher.loss import Objective, inputs_and_labels
from sparseft.selection.arguments import check_count
from sparseft.selection.gradient import for_each_gradient, zeros
from sparseft.selection.watched import first_samples


def score(
    model: nn.Module,
    data: Iterable[Any],
    names: list[str],
    *,
    seed: int,
    progress: bool,
    objective: Literal["contrastive", "task"] = "contrastive",
    samples: int | None = 1024,
    temperature: float = 0.07,
    features: Callable[[nn.Module, Any], Tensor] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return |d loss / d w|, fp32, in loss / weight, of the supervised contrastive loss of features, or of the task's.

    A head that is new says nothing about which weights matter; the contrastive loss (arXiv 2004.11362) needs none: it
    asks of each sample's features to be near those of its class in the same batch, and far from the others'.

    Embeddings have no neurons, and a token that does not occur has no gradient: they count in a density, but have no
    scores, and `info["unscored"]` of the mask lists them.

    Differences from the published code: it takes the K largest of each neuron, `per_group=K` of select; with a density
    instead, rows share the budget by size. It holds norms, class token and positions still and trains biases and the
    head whole: `exclude=` and `dense=`. It uses two augmented
    views of each image and all training images, with dropout on; here a sample is seen once, in evaluation mode, so
    that only other samples of its class are near. A row of transformers' Conv1D, which has it in the second dimension,
    is a neuron here too.

    Args:
        model: left as it was found.
        data: batches with labels; for "contrastive" one class a sample, with several samples of a class in a batch.
        names: the parameters to score.
        seed: not used.
        progress: show a bar.
        objective: "contrastive", or "task", the loss of the model's own head averaged over samples.
        samples: how many to use, from the start of the data; None means all.
        temperature: by which similarities are divided.
        features: a function of (model, inputs without labels) that returns the features, [N, D]. By default, of a
            transformers model, its base model's pooled output, or where it has none the mean of its last hidden states
            over tokens that are no padding.
        loss: for "task": a function of (model, batch) that returns one loss a sample, in place of the head's own.

    Raises:
        TypeError: samples is not a whole number.
        ValueError: an option is out of range or belongs to the other objective; no data; labels that are not one class
            a sample; no two samples of a class in any batch; a parameter that the features do not depend on.
    """
    _check(objective, samples, temperature, features, loss)
    names = _without_embeddings(model, names)
    sums = zeros(model, names)
    reached: set[str] = set()
    contrast = _Contrast(model, features or _features, temperature)
    task = Objective("empirical", loss, "mean", seed)

    def value(batch: Any, positions: list[int]) -> Tensor:
        if objective == "contrastive":
            return contrast(batch)
        return task(model, batch, positions).outputs.sum()

    def take(name: str, grad: Tensor, count: int) -> None:
        reached.add(name)
        sums[name].add_(grad)

    watched = first_samples(data, samples, progress=progress)
    used = for_each_gradient(model, watched, names, value, take)
    if objective == "contrastive":
        contrast.check(names, reached)
    scale = contrast.anchors if objective == "contrastive" else used
    return {name: total.abs_().div_(scale) for name, total in sums.items()}, {"samples": used}


class _Contrast:
    """The supervised contrastive loss of a batch, summed over the samples that have another of their class in it.

    Attributes:
        anchors: how many samples had one so far.
    """

    def __init__(self, model: nn.Module, features: Callable[[nn.Module, Any], Tensor], temperature: float) -> None:
        self._model, self._features, self._temperature = model, features, temperature
        self.anchors = 0

    def __call__(self, batch: Any) -> Tensor:
        inputs, labels = inputs_and_labels(batch)
        classes = _classes(labels, size(batch))
        found = self._features(self._model, inputs)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(classes):
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"features must return one vector a sample, shape [{len(classes)}, D], got {got}")
        alone = torch.eye(len(classes), dtype=torch.bool, device=found.device)
        positives = (classes[:, None] == classes) & ~alone
        counts = positives.sum(1)
        self.anchors += int((counts > 0).sum())
        units = F.normalize(found.float(), dim=1)
        similarities = (units @ units.T / self._temperature).masked_fill(alone, float("-inf"))
        likelihoods = similarities - similarities.logsumexp(1, keepdim=True)
        sums = likelihoods.masked_fill(~positives, 0.0).sum(1)
        return -(sums / counts.clamp(min=1)).sum()

    def check(self, names: Iterable[str], reached: set[str]) -> None:
        """Raise unless there was something to compare, and all parameters took part in it."""
        if not self.anchors:
            raise ValueError(
                "the contrastive loss compares samples of one class, and no batch holds two; use larger batches, or "
                'objective="task"'
            )
        missed = [name for name in names if name not in reached]
        if missed:
            raise ValueError(
                f"features do not depend on {', '.join(missed[:4])}{' and others' if len(missed) > 4 else ''}, which "
                "the contrastive loss therefore cannot score; exclude them, or train them whole (dense=)"
            )


def _check(objective: str, samples: int | None, temperature: float, features: object, loss: object) -> None:
    if objective not in ("contrastive", "task"):
        raise ValueError(f'objective must be "contrastive" or "task", got {objective!r}')
    check_count("samples", samples, or_all=True)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive, got {temperature}")
    if objective == "task" and features is not None:
        raise ValueError('features are for objective="contrastive"')
    if objective == "contrastive" and loss is not None:
        raise ValueError('a loss of your own goes with objective="task"')


def _without_embeddings(model: nn.Module, names: list[str]) -> list[str]:
    """Return the names of parameters that are no embedding, tied to a head or not."""
    parameters = dict(model.named_parameters())
    tables = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    kept = [name for name in names if id(parameters[name]) not in tables]
    if not kept:
        raise ValueError(
            "method 'gps' selects inputs of neurons, and all selectable parameters are embeddings; check include and "
            "exclude"
        )
    return kept


def _classes(labels: Tensor | None, samples: int) -> Tensor:
    if labels is None:
        raise ValueError('every batch must hold labels ("labels" in a mapping, or (inputs, targets)), got none')
    if labels.is_floating_point() or labels.numel() != samples:
        raise ValueError(
            f"the contrastive loss needs one class a sample, got labels {labels.dtype} {list(labels.shape)} for "
            f'{samples} samples; use objective="task"'
        )
    return labels.reshape(samples)


def _features(model: nn.Module, inputs: Any) -> Tensor:
    """Return a transformers model's pooled output, or the mean of its hidden states over tokens: [N, D]."""
    whole = headed(model)
    base = getattr(whole, "base_model", None)
    decodes = getattr(getattr(whole, "config", None), "is_encoder_decoder", False)
    if not isinstance(inputs, Mapping) or not isinstance(base, nn.Module) or decodes:
        raise ValueError(
            f"it is not known what the features of {type(whole).__name__} are; pass `features`, a function of (model, "
            'inputs) that returns [N, D], or use objective="task"'
        )
    outputs = outputs_of(base, inputs, None)
    pooled: Tensor | None = getattr(outputs, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    hidden: Tensor = outputs.last_hidden_state
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.flatten(1, -2).mean(1)
    kept: Tensor = mask.to(hidden.dtype)[..., None]
    return (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)
