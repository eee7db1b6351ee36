"""The masks that schedules begin with, and those that they choose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.entries import check_no_entries
from sparseft.index_lists import index_dtype
from sparseft.mask import Mask, aliases, fingerprint, match_names
from sparseft.optim.base import SparseOptimizer
from sparseft.selection.arguments import check_model
from sparseft.selection.scopes import layouts
from sparseft.selection.top_k import top_k


def whole_mask(
    model: nn.Module,
    optimizer: SparseOptimizer,
    include: str | Iterable[str] | None,
    dense: str | Iterable[str] | None,
    default: Iterable[str] | None = None,
) -> Mask:
    """Return the mask of all entries that may be chosen; what else the optimizer trains is dense in it.

    Its fingerprint is of the weights of now, and so is that of a mask which `ranked` makes of it.

    include: patterns of the parameters to choose from; those named by `default` if it is None, or all.

    Raises:
        RuntimeError: the model's gradients are compact.
        TypeError: the model is none.
        ValueError: the optimizer trains nothing of the model, a pattern matches nothing, or nothing may be chosen.
    """
    check_model(model)
    check_no_entries(model)
    trains = {id(param) for group in optimizer.param_groups for param in group["params"]}
    parameters = {name: p for name, p in model.named_parameters() if id(p) in trains and p.requires_grad}
    if not parameters:
        raise ValueError("the optimizer trains no parameter of the model; make it from that model's parameters")
    dense_names = match_names(dense, parameters, "dense")
    if include is not None:
        names = match_names(include, parameters, "include")
    else:
        names = [name for name in parameters if default is None or name in set(default)]
    names = [name for name in names if name not in dense_names]
    if not names:
        raise ValueError(
            "there is nothing to choose from: no parameter that the optimizer trains is left over by include and "
            "dense; give include= patterns of those to choose from"
        )
    shapes = {name: parameters[name].shape for name in names}
    entries = {
        name: torch.arange(shape.numel(), dtype=index_dtype(shape.numel()), device=parameters[name].device)
        for name, shape in shapes.items()
    }
    rest = {name: parameter.shape for name, parameter in parameters.items() if name not in shapes}
    base = fingerprint(model, (name for name, _ in model.named_parameters() if name not in rest))
    return Mask(entries, shapes, dense=rest, aliases=aliases(model), fingerprint=base)


def ranked(scores: Mapping[str, Tensor], whole: Mask, model: nn.Module, **options: Any) -> Mask:
    """Return the mask of the entries with the largest scores; what `whole` trains whole it does too.

    options: those of `top_k`.

    Raises:
        ValueError: as `top_k`: scores are not finite, or all zero.
    """
    return top_k(
        scores,
        layouts=layouts(model),
        dense=whole.dense,
        aliases=whole.aliases,
        fingerprint=whole.fingerprint,
        **options,
    )


def linear_weights(model: nn.Module) -> dict[str, int]:
    """Return the names of the weights of linear layers, and the dimension of each that counts the layer's inputs.

    A weight that a layer of another kind uses too, as a tied embedding does, is none. Nor are those of layers that
    other modules read the weights of, as multi-head attention does.
    """
    check_model(model)
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    found = {}
    for name, parameter in model.named_parameters():
        # transformers' Conv1D is a linear layer with its weight transposed
        kinds = {"Conv1D" if type(m).__name__ == "Conv1D" else type(m) for m in owners[id(parameter)]}
        if parameter.dim() == 2 and kinds in ({nn.Linear}, {"Conv1D"}):
            found[name] = 1 if kinds == {nn.Linear} else 0
    return found
