"""Which weights to train: `select(name, model, data, density=...)`, one file a method.

A method is a function `score(model, data, names, *, seed, progress, **options)` in a file of its own, which returns
the scores of the named parameters and what is worth recording, and one line in METHODS. "ird" chooses entries by a
search in place of scores, "bitfit" by their names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from sparseft.entries import check_no_entries
from sparseft.mask import Mask, aliases, fingerprint, match_names, versions, with_rest
from sparseft.selection import bitfit, child_tuning, fish, gps, ird, magnitude, random, sift, snip, wanda
from sparseft.selection.arguments import check_model, check_whole
from sparseft.selection.ird import IRDPath
from sparseft.selection.scopes import Layout, Scope, Structure, check_groups, layouts
from sparseft.selection.top_k import check_density, top_k

__all__ = ["METHODS", "IRDPath", "Layout", "ird_search", "layouts", "select", "top_k"]


class Method(NamedTuple):
    """How a method scores, and among which entries it ranks unless told otherwise.

    scope: None where `score` gives the entries themselves, which leaves nothing to rank and no budget to give.
    options: what takes the method's options, where it is not `score` itself.
    """

    score: Callable[..., Any]
    scope: Scope | None
    needs_data: bool
    options: Callable[..., Any] | None = None


METHODS = {
    "random": Method(random.score, "global", needs_data=False),
    "magnitude": Method(magnitude.score, "global", needs_data=False),
    "bitfit": Method(bitfit.entries, None, needs_data=False),
    "wanda": Method(wanda.score, "row", needs_data=True),
    "snip": Method(snip.score, "global", needs_data=True),
    "sift": Method(sift.score, "tensor", needs_data=True),
    "gps": Method(gps.score, "row", needs_data=True),
    "child_tuning": Method(child_tuning.score, "global", needs_data=True),
    "fish": Method(fish.score, "global", needs_data=True),
    "ird": Method(ird.search, "global", needs_data=True, options=ird.Options),
}


def select(
    name: str,
    model: nn.Module,
    data: Iterable[Any] | None = None,
    density: float | None = None,
    *,
    k: int | None = None,
    per_group: int | None = None,
    dense: str | Iterable[str] | None = (),
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    scope: Scope | None = None,
    structure: Structure | None = None,
    block: int | tuple[int, int] | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Mask:
    """Choose which weights of a model to train.

    Args:
        name: a method: "fish" (per-sample Fisher information), "ird" (Fisher information, searching samples and
            entries together), "child_tuning" (Fisher information, also of batches), "gps" (gradient by neuron, of a
            contrastive loss), "sift" (gradient of the first batches), "snip" (that times the weight), "wanda" (weight
            times the norm of its input), "magnitude" (largest weights), "bitfit" (all biases) or "random".
        model: the pretrained model; left as it was found.
        data: batches with labels, of training data; not needed by "magnitude", "bitfit" and "random".
        density: selected over selectable entries, in (0, 1], whether or not the method has scores for all. Give this,
            k or per_group; none for "bitfit". For "ird" it is where the search starts, and the most that it takes.
        k: number of entries to select; for "ird" where the search starts, and the most that it takes.
        per_group: number of entries to select in each group of the scope, each neuron ("row") for instance.
        dense: shell-style patterns of parameters that train whole, outside the budget: a new head, as a rule.
        include: patterns of the parameters to select from; by default all that have requires_grad.
        exclude: patterns of parameters to leave out.
        scope: among which entries the scores are ranked: "global", "layer", "tensor", "row" (the weights into one
            neuron), "column" (those out of one input) or "block". Groups share the budget by size; see
            `sparseft.top_k`. By default what the method's paper does ("tensor" for sift, "row" for gps
            and wanda, else "global").
        structure: select whole units, each "row", "column" or "block", by their mean score; see `sparseft.top_k`.
        block: rows and columns of a block, where there are any.
        seed: of random scores and sampled labels.
        progress: show a progress bar where it takes long.
        options: of the method, for instance samples=1024 for "fish"; see its file.

    Returns:
        A Mask with exactly floor(density * n) entries ("ird" and whole units: with at most as many; "bitfit": with all
        biases), and in `info` how it was made; of whole units also how much of the density's budget is "unused".

    Raises:
        TypeError: an argument is of the wrong type, or the method has no such option.
        ValueError: an argument is out of range, a pattern matches nothing, no parameter is selectable, the data is
            empty or has no labels, or the scores are all zero or not finite.
    """
    if name == "ird":
        if per_group is not None or structure is not None or block is not None:
            raise ValueError("method 'ird' searches single entries: leave per_group, structure and block out")
        path = ird_search(
            model,
            data,
            density,
            k=k,
            dense=dense,
            include=include,
            exclude=exclude,
            scope=scope,
            seed=seed,
            progress=progress,
            **options,
        )
        return with_rest(path.mask, model)
    method = checked_method(name, model, data, seed, options)
    if method.scope is None:
        _check_no_budget(
            name, density=density, k=k, per_group=per_group, scope=scope, structure=structure, block=block
        )
        names, mask_options = _prepared(model, dense, include, exclude)
        shapes = {other: model.get_parameter(other).shape for other in names}
        mask = Mask(method.score(model, names), shapes, info=_info(name, options, None, seed, {}), **mask_options)
        return with_rest(mask, model)
    # whole units do not compete inside one of them
    usual = "tensor" if structure is not None and method.scope == "row" else method.scope
    groups: dict[str, Any] = {
        "scope": scope or usual, "structure": structure, "block": block, "per_group": per_group
    }  # fmt: skip
    check_groups(**groups, counted=density is not None or k is not None)
    if per_group is None:
        check_density(density, k)
    names, mask_options = _prepared(model, dense, include, exclude)
    scores, found = method.score(model, data, names, seed=seed, progress=progress, **options)
    info = {**_info(name, options, density, seed, groups), **found}
    unscored = {other: model.get_parameter(other).shape for other in names if other not in scores}
    if unscored:
        info["unscored"] = list(unscored)
    views = layouts(model)
    mask = top_k(scores, density, k=k, layouts=views, unscored=unscored, info=info, **groups, **mask_options)
    return with_rest(mask, model)


def ird_search(
    model: nn.Module,
    data: Iterable[Any] | None,
    density: float | None = None,
    *,
    k: int | None = None,
    dense: str | Iterable[str] | None = (),
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    scope: Scope | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> IRDPath:
    """Search samples and entries together, and return the whole path: every cell looked at, and a mask for each.

    `select("ird", ...)` is the mask of the chosen cell. The arguments are those of `select`; the options are those of
    `sparseft.selection.ird.Options`.
    """
    checked_method("ird", model, data, seed, options)
    check_density(density, k)
    scope = scope or "global"
    if scope not in ("global", "tensor"):
        raise ValueError(f"method 'ird' has scope 'global' or 'tensor', got {scope!r}")
    chosen = ird.Options(**options)
    names, mask_options = _prepared(model, dense, include, exclude)
    return ird.search(
        model,
        data if data is not None else (),
        names,
        chosen,
        density=density,
        k=k,
        scope=scope,
        seed=seed,
        progress=progress,
        info=_info("ird", chosen.changed(), density, seed, {"scope": scope}),
        **mask_options,
    )


def selectable(
    model: nn.Module,
    dense: str | Iterable[str] | None = (),
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> tuple[list[str], list[str]]:
    """Return the names of the parameters to select from, and of those that train whole.

    Raises:
        RuntimeError: the model's gradients are compact.
        ValueError: a pattern matches nothing, or no parameter is left.
    """
    check_no_entries(model)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no parameter with requires_grad=True; unfreeze what may be selected")
    dense_names = match_names(dense, trainable, "dense")
    names = match_names(include, trainable, "include") if include is not None else trainable
    left_out = match_names(exclude, trainable, "exclude") if exclude is not None else []
    names = [name for name in names if name not in left_out and name not in dense_names]
    if not names:
        raise ValueError("no parameter is selectable: include, exclude and dense leave none over")
    return names, dense_names


def checked_method(name: str, model: object, data: object, seed: object, options: Mapping[str, Any]) -> Method:
    """Return the method, or raise before anything is computed."""
    if not isinstance(name, str):
        raise TypeError(f"the method must be given by name, before the model, got {type(name).__name__}")
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    check_model(model)
    check_whole("seed", seed)
    method = METHODS[name]
    _check_options(name, method, options)
    if method.needs_data and data is None:
        raise ValueError(f"method {name!r} needs data: pass batches of training samples with labels")
    return method


def _check_no_budget(name: str, **given: Any) -> None:
    """Raise if a method that chooses by names is told how many to choose, or among which."""
    surplus = [option for option, value in given.items() if value is not None]
    if surplus:
        raise ValueError(
            f"method {name!r} takes all that it finds: leave {', '.join(surplus)} out; choose fewer by name with "
            "include and exclude, or rank them by another method, as select('fish', ..., include='*bias', k=1000) does"
        )


def _prepared(
    model: nn.Module,
    dense: str | Iterable[str] | None,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
) -> tuple[list[str], dict[str, Any]]:
    """Return the names to select from, and what the mask keeps of the model."""
    names, dense_names = selectable(model, dense, include, exclude)
    parameters = dict(model.named_parameters())
    return names, {
        "dense": {other: parameters[other].shape for other in dense_names},
        "aliases": aliases(model),
        "fingerprint": fingerprint(model, (other for other in parameters if other not in dense_names)),
    }


def _info(
    name: str, options: Mapping[str, Any], density: float | None, seed: int, groups: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "method": name,
        "options": {key: value for key, value in options.items() if isinstance(value, (bool, int, float, str))},
        "density_asked": density,
        **{
            key: list(value) if isinstance(value, tuple) else value
            for key, value in groups.items()
            if value is not None
        },
        "seed": seed,
        "versions": versions(),
    }


def _check_options(name: str, method: Method, options: Mapping[str, Any]) -> None:
    known = set(inspect.signature(method.options or method.score).parameters) - {
        "model",
        "data",
        "names",
        "seed",
        "progress",
    }
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(
            f"method {name!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}"
        )
