"""DELIFT's three stages of fine-tuning: what is worth training on at first, for a task, and after earlier data.

Each takes kernels, `kernel[c, r]` being how much example c helps with sample r: those of `utility_kernel`, which is
the paper's, `embedding_kernel` or `fisher_kernel`. Source: arXiv 2411.04425.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sparseft.data.chosen import ChosenSamples, owners
from sparseft.data.greedy import lazy_greedy
from sparseft.data.objectives import (
    ConditionalGain,
    FacilityLocation,
    Objective,
    PoolMutualInformation,
    QueryMutualInformation,
    check_fp32,
    nonnegative,
)

Negative = Literal["shift", "clip"]


def instruction_tuning(
    kernel: Tensor,
    budget: int | float,
    *,
    costs: Sequence[int] | Tensor | None = None,
    negative: Negative = "shift",
    stop_at_zero: bool = False,
) -> ChosenSamples:
    """Choose samples that stand for all: facility location.

    Args:
        kernel: fp32 [pool, pool].
        budget: how many samples to choose, or a float in (0, 1], their share; with costs, the most that they may cost.
        costs: of each sample of the pool, in whole numbers, as the tokens of its prompt and response. Samples are then
            chosen by their gain for each, see `lazy_greedy`.
        negative: what becomes of negative entries, see `nonnegative`.
        stop_at_zero: choose fewer where no sample adds anything more.

    Raises:
        TypeError: a kernel that is not fp32.
        ValueError: a kernel with NaN, without rows or not square; a budget that cannot be met.
    """
    _check_pool(kernel, "a kernel [pool, task] goes to task_specific")
    (similarity,) = _similarities(negative, kernel=kernel)
    options = {"negative": negative, "stop_at_zero": stop_at_zero}
    return _chosen("instruction_tuning", FacilityLocation(similarity), kernel, budget, costs, options)


def task_specific(
    kernel: Tensor,
    budget: int | float,
    *,
    query: Tensor | None = None,
    eta: float = 1.0,
    costs: Sequence[int] | Tensor | None = None,
    negative: Negative = "shift",
    stop_at_zero: bool = False,
) -> ChosenSamples:
    """Choose samples that help with a task: the mutual information of facility location with samples of the task.

    There are two forms of it. The one over the queries asks how much the pool helps with the task, and takes as many
    utilities as pool times task: it is the default. The one over the pool, which the published code has, asks how well
    those of the pool are represented that the task stands for; it is used where `query` is given.

    Over the queries, a copy of a chosen sample is still worth `eta` times what it is to the task: leave copies out.

    Args:
        kernel: fp32 [pool, task]; with query [pool, pool].
        budget: as for `instruction_tuning`.
        query: fp32 [task, pool].
        eta: over queries, the weight of being like the task whatever else is chosen; over the pool, how far samples
            may count that are more like a chosen one than like the task.
        costs: as for `instruction_tuning`.
        negative: as for `instruction_tuning`; both kernels are shifted by the same.
        stop_at_zero: as for `instruction_tuning`.

    Raises:
        TypeError: as for `instruction_tuning`.
        ValueError: as for `instruction_tuning`; kernels that do not fit each other; a task without samples.
    """
    options = {"negative": negative, "stop_at_zero": stop_at_zero, "eta": eta}
    if query is None:
        _check_matrix("kernel", kernel, "[pool, task]")
        (similarity,) = _similarities(negative, kernel=kernel)
        return _chosen("task_specific", QueryMutualInformation(similarity, eta), kernel, budget, costs, options)
    _check_pool(kernel, "a kernel [pool, task] is used without query")
    _check_beside("query", query, kernel, "[task, pool]", "; a task without samples says nothing")
    similarity, other = _similarities(negative, kernel=kernel, query=query)
    return _chosen("task_specific", PoolMutualInformation(similarity, other, eta), kernel, budget, costs, options)


def continual(
    kernel: Tensor,
    budget: int | float,
    *,
    known: Tensor,
    nu: float = 1.0,
    costs: Sequence[int] | Tensor | None = None,
    negative: Negative = "shift",
    stop_at_zero: bool = False,
) -> ChosenSamples:
    """Choose samples that stand for what earlier data does not: the conditional gain of facility location.

    Args:
        kernel: fp32 [pool, pool].
        budget: as for `instruction_tuning`.
        known: fp32 [earlier samples, pool], how much these help with each of the pool.
        nu: how strictly to keep away from what the earlier samples stand for.
        costs: as for `instruction_tuning`.
        negative: as for `instruction_tuning`; both kernels are shifted by the same.
        stop_at_zero: as for `instruction_tuning`.

    Raises:
        TypeError: as for `instruction_tuning`.
        ValueError: as for `instruction_tuning`; kernels that do not fit each other; no earlier samples.
    """
    _check_pool(kernel, "a kernel [pool, task] goes to task_specific")
    _check_beside("known", known, kernel, "[earlier samples, pool]", "; use instruction_tuning if there are none")
    similarity, other = _similarities(negative, kernel=kernel, known=known)
    options = {"negative": negative, "stop_at_zero": stop_at_zero, "nu": nu}
    return _chosen("continual", ConditionalGain(similarity, other, nu), kernel, budget, costs, options)


def _check_matrix(name: str, kernel: Tensor, shape: str, empty: str = "") -> None:
    check_fp32(name, kernel)
    if kernel.dim() != 2 or not kernel.numel():
        raise ValueError(f"{name} must be {shape} with at least one of each, got {list(kernel.shape)}{empty}")


def _check_pool(kernel: Tensor, mistake: str) -> None:
    """Raise unless a kernel is of a pool and itself."""
    _check_matrix("kernel", kernel, "[pool, pool]")
    rows, columns = kernel.shape
    if rows != columns:
        raise ValueError(
            f"kernel must be square, [pool, pool], so [{rows}, {rows}] for {rows} examples, got [{rows}, {columns}]; "
            f"{mistake}"
        )


def _check_beside(name: str, other: Tensor, kernel: Tensor, shape: str, empty: str) -> None:
    """Raise unless a kernel has the pool's samples as columns, as `kernel` has."""
    _check_matrix(name, other, shape, empty)
    pool = kernel.shape[1]
    if other.shape[1] != pool:
        turned = f"; it looks turned around: the columns of {name} are the pool" if other.shape[0] == pool else ""
        raise ValueError(
            f"{name} must be {shape}, with a column for each of the {pool} samples of kernel, got {list(other.shape)}"
            f"{turned}"
        )


def _similarities(negative: Negative, **kernels: Tensor) -> list[Tensor]:
    """Return kernels without negative entries, see `nonnegative`."""
    if negative not in get_args(Negative):
        raise ValueError(f'negative must be "shift" or "clip", got {negative!r}')
    for name, kernel in kernels.items():
        lowest, highest = torch.aminmax(kernel, dim=1)
        bad = (~(lowest.isfinite() & highest.isfinite())).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(
                f"{name} must be finite, got NaN or infinities in rows {bad[:5]}; leave out the samples they are of"
            )
    return nonnegative(*kernels.values(), how=negative)


def _chosen(
    stage: str,
    objective: Objective,
    kernel: Tensor,
    budget: int | float,
    costs: Sequence[int] | Tensor | None,
    options: dict[str, Any],
) -> ChosenSamples:
    found = lazy_greedy(objective, budget, costs=costs, stop_at_zero=options["stop_at_zero"])
    info = {"stage": stage, "objective": type(objective).__name__, "budget": budget, **options}
    if costs is not None:
        info["cost"] = sum(int(costs[index]) for index in found.indices.tolist())
    owner, worth = owners(objective.coverage(), found.indices)
    return ChosenSamples.made(found, owner, worth, kernel, objective.value(found.indices), info)
