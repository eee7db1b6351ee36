"""Which weights of a loaded model to train: by a selection method, or as one of two baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sparseft.integrations.encoding import Encoded
from sparseft.integrations.models import Loaded, device
from sparseft.mask import Mask, fingerprint, versions
from sparseft.selection import METHODS as SELECTION_METHODS
from sparseft.selection import select
from sparseft.selection.scopes import Scope, Structure, check_groups
from sparseft.selection.top_k import check_density

# "head" trains new parameters only, "full" trains everything with torch.optim.AdamW
BASELINES = ("head", "full")
METHODS = (*SELECTION_METHODS, *BASELINES)
SAMPLING = tuple(name for name, method in SELECTION_METHODS.items() if method.needs_data)
DEFAULT_DENSITY = 0.005


def choose(
    loaded: Loaded,
    encoded: Encoded,
    method: str = "fish",
    density: float | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scope: Scope | None = None,
    structure: Structure | None = None,
    block: tuple[int, int] | None = None,
    samples: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Mask | None:
    """Choose which weights to train, looking at training rows only; None stands for all of them (method "full").

    Args:
        loaded: the model; its new parameters train whole, outside the budget.
        encoded: the data.
        method: a selection method, "head" or "full".
        density: selected over selectable weights, in (0, 1]; 0.005 if left out. "bitfit", "head" and "full" have none.
        include: patterns of the parameters to select from; all if empty.
        exclude: patterns of parameters to leave out.
        scope: among which weights they are ranked, as for `sparseft.select`; None for the method's own.
        structure: whole units to select, as for `sparseft.select`.
        block: rows and columns of a block.
        samples: rows to look at, for a method that looks at any; None for the method's default.
        batch_size: rows at a time.
        seed: which rows, and a method's own random choices.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an option is out of range or does not go with the method.
    """
    check_choice(method, density, samples, scope, structure, block, include, exclude)
    if method == "full":
        return None
    if method == "head":
        return _head_mask(loaded)
    options: dict[str, Any] = {}
    if samples is not None:
        by_batch = method in ("sift", "snip")
        options = {"batches": math.ceil(samples / batch_size)} if by_batch else {"samples": samples}
    if method == "gps" and encoded.task != "classification":
        options["objective"] = "task"  # there are no classes to tell apart
    if method != "bitfit":
        options["density"] = DEFAULT_DENSITY if density is None else density
    loaded.model.to(device())
    return select(
        method,
        loaded.model,
        encoded.batches(encoded.train, batch_size, device(), seed),
        dense=loaded.new,
        include=include or None,
        exclude=exclude or None,
        scope=scope,
        structure=structure,
        block=block,
        seed=seed,
        progress=progress,
        **options,
    )


def check_choice(
    method: str,
    density: float | None = None,
    samples: int | None = None,
    scope: Scope | None = None,
    structure: Structure | None = None,
    block: tuple[int, int] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> None:
    """Raise unless the method is known, what is in range, and options are given to methods that have them only."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    check_density(DEFAULT_DENSITY if density is None else density)
    if density is not None and method == "bitfit":
        raise ValueError(f"density must be left out for method 'bitfit', which takes all biases; got {density}")
    if samples is not None and method not in SAMPLING:
        raise ValueError(f"samples must be left out for method {method!r}, which looks at no data; got {samples}")
    patterns = {"density": density, "include": include or None, "exclude": exclude or None}
    surplus = [name for name, value in patterns.items() if value is not None]
    if surplus and method in BASELINES:
        what = "the new parameters, all of them" if method == "head" else "everything"
        raise ValueError(f"{', '.join(surplus)} must be left out for method {method!r}, which trains {what}")
    given = {"scope": scope, "structure": structure, "block": block}
    surplus = [name for name, value in given.items() if value is not None]
    if surplus and method in (*BASELINES, "bitfit"):
        raise ValueError(f"{', '.join(surplus)} must be left out for method {method!r}, which ranks nothing")
    check_groups(scope or "global", structure, block, None, counted=True)


def _head_mask(loaded: Loaded) -> Mask:
    if not loaded.new:
        raise ValueError("method 'head' needs a model whose head is new, and this one has no new parameter")
    shapes = {name: parameter.shape for name, parameter in loaded.model.named_parameters()}
    rest = {name: shape for name, shape in shapes.items() if name not in loaded.new}
    return Mask(
        {},
        rest,
        dense={name: shapes[name] for name in loaded.new},
        info={"method": "head", "versions": versions()},
        fingerprint=fingerprint(loaded.model, rest),
    )
