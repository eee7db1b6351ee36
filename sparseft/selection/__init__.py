"""Which weights to train: `select(name, model, data, density=...)`, one file a method.

A method is a function `score(model, data, names, *, seed, progress, **options)` in a file of its own, which returns
the scores of the named parameters and what is worth recording, and one line in METHODS.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparseft.mask import Mask, aliases, fingerprint, match_names, versions
from sparseft.selection import fish, magnitude, random, sift
from sparseft.selection.top_k import Scope, check_density, top_k

__all__ = ["METHODS", "select", "top_k"]


class Method(NamedTuple):
    """How a method scores, and among which entries it ranks unless told otherwise."""

    score: Callable[..., tuple[Mapping[str, Tensor], dict[str, Any]]]
    scope: Scope
    needs_data: bool


METHODS = {
    "random": Method(random.score, "global", needs_data=False),
    "magnitude": Method(magnitude.score, "global", needs_data=False),
    "sift": Method(sift.score, "tensor", needs_data=True),
    "fish": Method(fish.score, "global", needs_data=True),
}


def select(
    name: str,
    model: nn.Module,
    data: Iterable[Any] | None = None,
    density: float | None = None,
    *,
    k: int | None = None,
    dense: str | Iterable[str] = (),
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    scope: Scope | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Mask:
    """Choose which weights of a model to train.

    Args:
        name: a method: "fish" (per-sample Fisher information), "sift" (gradient of the first batches), "magnitude"
            (largest weights) or "random".
        model: the pretrained model; left as it was found.
        data: batches with labels, of training data; not needed by "magnitude" and "random".
        density: selected over selectable entries, in (0, 1]. Give this or k.
        k: number of entries to select.
        dense: shell-style patterns of parameters that train whole, outside the budget: a new head, as a rule.
        include: patterns of the parameters to select from; by default all that have requires_grad.
        exclude: patterns of parameters to leave out.
        scope: "global" ranks all entries together, "tensor" takes the density of each parameter by itself; by default
            what the method's paper does ("tensor" for sift, else "global").
        seed: of random scores and sampled labels.
        progress: show a progress bar where it takes long.
        options: of the method, for instance samples=1024 for "fish"; see its file.

    Returns:
        A Mask with exactly floor(density * n) entries, and in `info` how it was made.

    Raises:
        ValueError: an argument is out of range, a pattern matches nothing, no parameter is selectable, the data is
            empty or has no labels, or the scores are all zero or not finite.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    check_density(density, k)
    _check_options(name, method, options)
    if method.needs_data and data is None:
        raise ValueError(f"method {name!r} needs data: pass batches of training samples with labels")
    names, dense_names = selectable(model, dense, include, exclude)
    base = fingerprint(model, (other for other, _ in model.named_parameters() if other not in dense_names))
    scores, found = method.score(model, data, names, seed=seed, progress=progress, **options)
    parameters = dict(model.named_parameters())
    plain = {key: value for key, value in options.items() if isinstance(value, (bool, int, float, str))}
    return top_k(
        scores,
        density,
        k=k,
        scope=scope or method.scope,
        dense={other: parameters[other].shape for other in dense_names},
        aliases=aliases(model),
        fingerprint=base,
        info={
            "method": name,
            "options": plain,
            "density_asked": density,
            "scope": scope or method.scope,
            "seed": seed,
            "versions": versions(),
            **found,
        },
    )


def selectable(
    model: nn.Module,
    dense: str | Iterable[str] = (),
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> tuple[list[str], list[str]]:
    """Return the names of the parameters to select from, and of those that train whole.

    Raises:
        ValueError: a pattern matches nothing, or no parameter is left.
    """
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


def _check_options(name: str, method: Method, options: Mapping[str, Any]) -> None:
    known = set(inspect.signature(method.score).parameters) - {"model", "data", "names", "seed", "progress"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(
            f"method {name!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}"
        )
