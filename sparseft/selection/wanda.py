"""Wanda: the largest weights, each times the norm of the input it meets. Source: arXiv 2306.11695. Needs no labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparseft.fisher import composite
from sparseft.fisher.batches import to_device
from sparseft.fisher.heads import headed, outputs_of
from sparseft.fisher.loss import inputs_and_labels
from sparseft.fisher.state import evaluation
from sparseft.selection.arguments import check_count
from sparseft.selection.scopes import layouts
from sparseft.selection.watched import first_samples


def score(
    model: nn.Module,
    data: Iterable[Any],
    names: list[str],
    *,
    seed: int,
    progress: bool,
    samples: int | None = 128,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return |w[o, i]| * ||x[i]||, fp32, of the weights of linear layers: x[i] is input i at every token of the data.

    Parameters that no linear layer multiplied by (embeddings, norms, biases, stacked experts, layers that did not
    run) count in a density, but have no such score, and `info["unscored"]` of the mask lists them. Tokens that the
    attention mask of a batch hides are not counted.

    Differences from the published code: it removes the weights with the lowest scores, here those with the highest
    train; it goes from layer to layer and feeds each one what the pruned ones before it give, here the model is whole;
    it leaves out the head, which `exclude=` does here. As there, each neuron ranks its own weights (scope "row").

    Args:
        model: left as it was found.
        data: batches; labels are ignored.
        names: the parameters to select from.
        seed: not used.
        progress: show a bar.
        samples: how many to use, from the start of the data; None means all.

    Raises:
        TypeError: samples is not a whole number.
        ValueError: samples is below 1; no data; no linear layer ran; a padded batch and a layer of which it cannot be
            told which of its inputs are padding.
    """
    check_count("samples", samples, or_all=True)
    parameters = dict(model.named_parameters())
    inputs = {name: view.columns[0] for name, view in layouts(model).items() if len(view.shape) == 2}
    watch = _Inputs({name: parameters[name] for name in names if name in inputs}, inputs)
    device = next(iter(parameters.values())).device
    used = 0
    with evaluation(model, {}), torch.no_grad(), watch:
        for batch, positions in first_samples(data, samples, progress=progress, description="Inputs"):
            batch = to_device(batch, device)
            watch.padding = _padding(model, batch)
            outputs_of(model, *inputs_and_labels(batch))
            used += len(positions)
    if not watch.squares:
        raise ValueError(
            "method 'wanda' scores weights of linear layers, and none of the selectable parameters is one that ran; "
            "check include and exclude"
        )
    scores = {}
    for name in names:
        if name in watch.squares:
            norms = watch.squares[name].sqrt().float()
            weight = parameters[name].detach().float().abs()
            scores[name] = weight.mul_(norms[:, None] if inputs[name] == 0 else norms)
    return scores, {"samples": used}


class _Inputs(TorchFunctionMode):
    """Adds up the squares of what linear layers are given: by operation, so that code that calls no module counts.

    Attributes:
        squares: parameter name -> fp64 [I].
        padding: which tokens of the batch are padding, bool [N, T], or None if there is none.
    """

    def __init__(self, weights: Mapping[str, Tensor], inputs: Mapping[str, int]) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self._inputs = inputs
        self.squares: dict[str, Tensor] = {}
        self.padding: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in composite.COMPOSITES:
            with self:
                return composite.body(func)(*args, **kwargs)
        if func is F.linear:
            self._add(1, *args[:2], **{key: kwargs[key] for key in ("input", "weight") if key in kwargs})
        elif func is torch.addmm and len(args) == 3:
            self._add(0, *args[1:])
        return func(*args, **kwargs)

    def _add(self, dim: int, input: Tensor, weight: Tensor) -> None:
        name = self._names.get(id(weight))
        if name is None or self._inputs[name] != dim:
            return
        if self.padding is not None:
            input = _without(input, self.padding, name)
        squares = input.float().flatten(0, -2).square().sum(0, dtype=torch.float64)
        self.squares[name] = self.squares[name] + squares if name in self.squares else squares


def _padding(model: nn.Module, batch: Any) -> Tensor | None:
    """Return which tokens of a batch are padding: bool [N, T]; None if there is none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.bool().all()):
        return None
    if getattr(getattr(headed(model), "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "of an encoder-decoder model, method 'wanda' cannot tell the decoder's padding: give batches without any, "
            "of one sample for instance"
        )
    return ~mask.bool()


def _without(input: Tensor, padding: Tensor, name: str) -> Tensor:
    """Return the rows of an input that are no padding: [rows, I]."""
    if input.shape[:-1] == padding.shape:
        return input[~padding]
    if input.dim() == 2 and len(input) == padding.numel():
        return input[~padding.flatten()]
    if input.dim() == 2 and len(input) == len(padding):
        return input  # one row a sample: pooled
    raise ValueError(
        f"it cannot be told which of the inputs {list(input.shape)} of {name} are padding in a batch of "
        f"{list(padding.shape)} tokens; give batches without padding, of one sample for instance, or exclude it"
    )
