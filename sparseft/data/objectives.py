"""What makes a subset good: facility location, its mutual information with a query, its gain over what is there.

A similarity is fp32 [examples, samples], finite and not negative: entry [c, r] says how well example c stands for
sample r, which need not be how well r stands for c. Each objective's `value` is its definition; `coverage` is the
form they share, in which `lazy_greedy` maximises all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Coverage(NamedTuple):
    """f(A) = sum_r (min(cap[r], max(floor[r], max_{c in A} s[c, r])) - floor[r]) + sum_{c in A} bonus[c].

    Attributes:
        similarity: s, fp32 [candidates, represented].
        floor: fp32 [represented], how well each sample is represented by what is not chosen.
        cap: fp32 [represented], not below floor, how well a sample need be represented.
        bonus: fp64 [candidates], what a candidate is worth whatever else is chosen.
    """

    similarity: Tensor
    floor: Tensor
    cap: Tensor
    bonus: Tensor


class Objective(Protocol):
    """A monotone submodular function of subsets of the candidates, which are the rows of a similarity."""

    @property
    def similarity(self) -> Tensor:
        """Return how well each candidate stands for each sample, fp32 [candidates, samples]."""
        ...

    def value(self, subset: Sequence[int] | Tensor) -> float:
        """Return f of a subset, in fp64, from its definition."""
        ...

    def coverage(self) -> Coverage:
        """Return f as a Coverage."""
        ...


@dataclass(frozen=True, eq=False)
class FacilityLocation:
    """f(A) = sum_r max_{c in A} s[c, r]: every sample has an example that stands for it.

    Attributes:
        similarity: s, fp32 [candidates, samples].
    """

    similarity: Tensor

    def __post_init__(self) -> None:
        check_similarity("similarity", self.similarity)

    def value(self, subset: Sequence[int] | Tensor) -> float:
        """Return f of a subset, in fp64, from its definition."""
        return float(_best(self.similarity, subset).sum())

    def coverage(self) -> Coverage:
        """Return f as a Coverage."""
        return _coverage(self.similarity)


@dataclass(frozen=True, eq=False)
class PoolMutualInformation:
    """f(A) = sum_r min(max_{c in A} s[c, r], eta * max_q t[q, r]): as far as a query is like the samples of the pool.

    A sample of the pool that no query stands for need not be represented. "FLVMI", or FL1MI in submodlib.

    Attributes:
        similarity: s, fp32 [candidates, samples of the pool].
        query: t, fp32 [queries, samples of the pool].
        eta: how far representing may exceed what the query does.
    """

    similarity: Tensor
    query: Tensor
    eta: float = 1.0

    def __post_init__(self) -> None:
        check_similarity("similarity", self.similarity)
        check_similarity("query", self.query, like=self.similarity)
        check_weight("eta", self.eta)

    def value(self, subset: Sequence[int] | Tensor) -> float:
        """Return f of a subset, in fp64, from its definition."""
        return float(torch.minimum(_best(self.similarity, subset), self._cap().double()).sum())

    def coverage(self) -> Coverage:
        """Return f as a Coverage."""
        return _coverage(self.similarity)._replace(cap=self._cap())

    def _cap(self) -> Tensor:
        return self.query.amax(0) * self.eta


@dataclass(frozen=True, eq=False)
class QueryMutualInformation:
    """f(A) = sum_q max_{c in A} s[c, q] + eta * sum_{c in A} max_q s[c, q]: examples that stand for the queries.

    It needs nothing of how candidates are like each other. "FLQMI", or FL2MI in submodlib.

    Attributes:
        similarity: s, fp32 [candidates, queries].
        eta: weight of examples being like some query, whether another example is so already or not.
    """

    similarity: Tensor
    eta: float = 1.0

    def __post_init__(self) -> None:
        check_similarity("similarity", self.similarity)
        check_weight("eta", self.eta)

    def value(self, subset: Sequence[int] | Tensor) -> float:
        """Return f of a subset, in fp64, from its definition."""
        chosen = self.similarity[torch.as_tensor(subset, dtype=torch.long)].double()
        return float(_best(self.similarity, subset).sum() + self.eta * chosen.amax(1).sum())

    def coverage(self) -> Coverage:
        """Return f as a Coverage."""
        return _coverage(self.similarity)._replace(bonus=self.similarity.amax(1).double() * self.eta)


@dataclass(frozen=True, eq=False)
class ConditionalGain:
    """f(A) = sum_r max(max_{c in A} s[c, r] - nu * max_p t[p, r], 0): what is not represented yet.

    Attributes:
        similarity: s, fp32 [candidates, samples].
        conditioning: t, fp32 [examples there already, samples].
        nu: how strictly to keep away from what is there already.
    """

    similarity: Tensor
    conditioning: Tensor
    nu: float = 1.0

    def __post_init__(self) -> None:
        check_similarity("similarity", self.similarity)
        check_similarity("conditioning", self.conditioning, like=self.similarity)
        check_weight("nu", self.nu)

    def value(self, subset: Sequence[int] | Tensor) -> float:
        """Return f of a subset, in fp64, from its definition."""
        return float((_best(self.similarity, subset) - self._floor().double()).clamp_min(0).sum())

    def coverage(self) -> Coverage:
        """Return f as a Coverage."""
        return _coverage(self.similarity)._replace(floor=self._floor())

    def _floor(self) -> Tensor:
        return self.conditioning.amax(0) * self.nu


def nonnegative(*similarities: Tensor, how: str = "shift") -> list[Tensor]:
    """Return similarities without negative entries, as objectives want them; all are treated alike.

    Args:
        similarities: fp32, of samples and examples that are compared with each other.
        how: "shift" subtracts the smallest entry of all of them, if it is negative: the best of bad examples is still
            better than a worse one. "clip" makes negative entries 0: an example that harms stands for nothing.

    Raises:
        TypeError: one is not fp32.
        ValueError: an entry is not finite, or there is none.
    """
    if how not in ("shift", "clip"):
        raise ValueError(f'how must be "shift" or "clip", got {how!r}')
    least = 0.0
    for similarity in similarities:
        check_similarity("a kernel", similarity)
        lowest, highest = torch.aminmax(similarity)
        if not math.isfinite(lowest) or not math.isfinite(highest):
            raise ValueError("similarities must be finite, got NaN or infinities; leave out the samples they are of")
        least = min(least, float(lowest))
    if least == 0:
        return list(similarities)
    if how == "clip":
        return [similarity.clamp_min(0) for similarity in similarities]
    return [similarity - least for similarity in similarities]


def check_similarity(name: str, similarity: Tensor, like: Tensor | None = None) -> None:
    """Raise unless it is an fp32 matrix with rows and columns, as many columns as `like`."""
    check_fp32(name, similarity)
    if similarity.dim() != 2 or not similarity.numel():
        raise ValueError(
            f"{name} must be [examples, samples] with at least one of each, got {list(similarity.shape)}; an empty "
            "query or conditioning set says nothing: use FacilityLocation without one"
        )
    if like is not None and similarity.shape[1] != like.shape[1]:
        raise ValueError(
            f"{name} must have a column for each of the {like.shape[1]} samples that similarity has, got "
            f"{similarity.shape[1]}"
        )
    if like is not None and not (similarity.isfinite().all() and bool((similarity >= 0).all())):
        raise ValueError(f"{name} must be finite and not negative; shift or clip it with sparseft.data.nonnegative")


def check_fp32(name: str, kernel: Tensor) -> None:
    """Raise unless it is an fp32 tensor."""
    if not isinstance(kernel, Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(kernel).__name__}; see torch.as_tensor")
    if kernel.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {kernel.dtype}; convert it with .float()")


def check_weight(name: str, value: float) -> None:
    """Raise unless it is a positive number."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value}")


def _best(similarity: Tensor, subset: Sequence[int] | Tensor) -> Tensor:
    """Return max_{c in A} s[c, r], fp64 [represented]; 0 for an empty subset."""
    chosen = torch.as_tensor(subset, dtype=torch.long)
    if not len(chosen):
        return torch.zeros(similarity.shape[1], dtype=torch.float64)
    return similarity[chosen].amax(0).double()


def _coverage(similarity: Tensor) -> Coverage:
    candidates, represented = similarity.shape
    return Coverage(
        similarity,
        floor=torch.zeros(represented),
        cap=torch.full((represented,), math.inf),
        bonus=torch.zeros(candidates, dtype=torch.float64),
    )
