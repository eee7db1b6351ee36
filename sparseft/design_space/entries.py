"""Selected entries of a plan: all groups are scored together, in one pass over the data, and each ranks its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sparseft.design_space.plan import Plan
from sparseft.selection import checked_method, layouts, selectable, top_k


def choose_entries(
    found: Plan,
    model: nn.Module,
    data: Iterable[Any] | None,
    method: str,
    *,
    seed: int,
    progress: bool,
    **options: Any,
) -> dict[str, Tensor]:
    """Return the index lists of every group with selected entries, as many of each as planned.

    They are what `select` chooses from a group alone, because no score depends on which other parameters are scored;
    but for "random", which draws for all of them in turn.

    Args:
        found: the plan.
        model: left as it was found.
        data: batches with labels, for methods that need them; read once, so that an iterator will do.
        method: of `sparseft.select`, with scores.
        seed: as for `select`.
        progress: as for `select`.
        options: of the method.

    Raises:
        RuntimeError: the model's gradients are compact.
        TypeError: the method has no such option.
        ValueError: the method has no scores, or needs data; what `select` refuses.
    """
    parts = found.parts("S")
    if not parts:
        return {}
    chosen = checked_method(method, model, data, seed, options)
    if chosen.scope is None or method == "ird":
        raise ValueError(
            f"method must score entries, so that every group gets as many as planned, got {method!r}, which says "
            "itself how many it takes; use another one, as 'fish'"
        )
    wanted = {name for part in parts for name in part.names}
    names = [name for name in selectable(model)[0] if name in wanted]
    scores, _ = chosen.score(model, data, names, seed=seed, progress=progress, **options)
    views = layouts(model)
    indices: dict[str, Tensor] = {}
    for part in parts:
        own = {name: scores[name] for name in part.names if name in scores}
        unscored = {name: model.get_parameter(name).shape for name in part.names if name not in scores}
        indices |= dict(top_k(own, k=part.weights, scope=chosen.scope, layouts=views, unscored=unscored))
    return indices
