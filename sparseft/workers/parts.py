"""Disjoint masks: the entries of one, dealt to workers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.fisher import FisherScores
from sparseft.mask import Mask, aliases, fingerprint, match_names, versions
from sparseft.selection import top_k
from sparseft.selection.arguments import check_count, check_model, check_whole
from sparseft.selection.top_k import check_density, count_at


def disjoint_masks(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    workers: int,
    density: float | None = None,
    *,
    k: int | None = None,
    dense: str | Iterable[str] | None = (),
) -> list[Mask]:
    """Select the best entries for several workers, and give each the same number of them, and about the same scores.

    The `workers * k` entries with the largest scores are dealt as `split` does. For scores of other methods than
    FISH, or other scopes: `split(select(name, model, data, k=workers * k), workers)`.

    Args:
        model: the base that all workers start from, with the weights that the scores are of.
        scores: parameter name -> fp32, bf16 or fp16 score of every entry, as `estimate_fisher` returns them.
        workers: how many masks to make.
        density: selected over selectable entries of each worker, in (0, 1]. Give this or k.
        k: number of entries of each worker.
        dense: shell-style patterns of parameters that every worker trains whole, outside the budget (a new head, say);
            they are the same for all, and averaged at merging. All workers must start from the same values of them.

    Returns:
        One mask a worker: disjoint, exactly k entries each, the same on every machine.

    Raises:
        TypeError: density is not a number, k or workers not a whole one, or scores are no mapping.
        ValueError: workers, density or k is out of range, `workers * k` is more than the selectable entries, a pattern
            matches nothing, or scores are not finite, all zero, or of another model.
    """
    check_model(model)
    check_count("workers", workers)
    check_density(density, k)
    _check_held(scores)
    parameters = dict(model.named_parameters())
    dense_names = match_names(dense, parameters, "dense")
    chosen = {name: score for name, score in scores.items() if name not in dense_names}
    n = sum(score.numel() for score in chosen.values())
    each = count_at(density, n) if density is not None else k or 0
    if workers * each > n:
        raise ValueError(
            f"{workers} disjoint masks of {each:,} entries need {workers * each:,}, and {n:,} are selectable; take a "
            "lower density or fewer workers"
        )
    info: dict[str, Any] = {"method": "scores", "density_asked": density, "versions": versions()}
    if isinstance(scores, FisherScores):
        info |= {"method": "fish", "samples": scores.report.samples}
    mask = top_k(
        chosen,
        k=workers * each,
        dense={name: parameters[name].shape for name in dense_names},
        aliases=aliases(model),
        info=info,
        fingerprint=fingerprint(model, (name for name in parameters if name not in dense_names)),
    )
    mask.check(model)
    return split(mask, workers, chosen)


def split(mask: Mask, workers: int, scores: Mapping[str, Tensor] | None = None, *, seed: int = 0) -> list[Mask]:
    """Deal the entries of a mask to workers, as evenly as their number allows.

    With scores, entries are dealt from the largest score to the smallest, ties in order of (parameter, index), in
    rounds that go there and back: first to last worker, last to first, and so on. Totals of scores that are not
    negative then differ by no more than the largest of them. Without, entries are dealt at random, by seed alone.

    Args:
        mask: whose entries are dealt; its dense parameters go to every worker.
        workers: how many masks to make; at most the number of entries.
        scores: parameter name -> scores of all entries of each masked parameter, or None.
        seed: of the random order.

    Returns:
        One mask a worker. They are disjoint, their union is `mask`, and their sizes differ by one at most.

    Raises:
        TypeError: workers or seed is not a whole number, or scores are no mapping.
        ValueError: workers is below 1 or above the number of entries, or scores are missing, of other shapes, or not
            finite.
    """
    check_count("workers", workers)
    check_whole("seed", seed)
    k = mask.k
    if workers > k:
        raise ValueError(f"workers must be at most the {k:,} entries of the mask, got {workers:,}")
    if scores is None:
        order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    else:
        _check_held(scores)
        order = _selected(mask, scores).sort(descending=True, stable=True).indices
    places = torch.arange(k)
    turns, backwards = places % workers, places // workers % 2 == 1
    owners = torch.empty(k, dtype=torch.int32)
    owners[order] = torch.where(backwards, workers - 1 - turns, turns).to(torch.int32)
    lists: list[dict[str, Tensor]] = [{} for _ in range(workers)]
    first = 0
    for name, positions in mask.items():
        owner = owners[first : first + positions.numel()].to(positions.device)
        first += positions.numel()
        for worker in range(workers):
            lists[worker][name] = positions[owner == worker]
    whole = _whole(mask)
    return [_part(mask, indices, {"of": workers, "parts": [worker], **whole}) for worker, indices in enumerate(lists)]


def _check_held(scores: object) -> None:
    """Raise unless scores are in memory."""
    if not isinstance(scores, Mapping):
        raise TypeError(
            f"scores must be a mapping from parameter name to tensor, got {type(scores).__name__}; of scores in files "
            "make a mask with top_k, and split it"
        )


def _selected(mask: Mask, scores: Mapping[str, Tensor]) -> Tensor:
    """Return the scores of a mask's entries, tensor after tensor: fp32 [k], on the CPU."""
    found = []
    for name, positions in mask.items():
        score = scores.get(name)
        if score is None or tuple(score.shape) != mask.shapes[name]:
            got = "none" if score is None else list(score.shape)
            raise ValueError(f"scores of {name} must have shape {list(mask.shapes[name])}, got {got}")
        found.append(score.reshape(-1)[positions.to(score.device).long()].float().cpu())
    values = torch.cat(found)
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"scores must be finite, got {bad} NaN or infinite ones; drop the samples that caused them")
    return values


def _whole(mask: Mask) -> dict[str, Any]:
    """Return which mask is dealt, as its parts keep it: a digest of its entries, and their number.

    Of a part it is the one that this is of: merging its parts alone would leave the rest out.
    """
    known = mask.info.get("workers", {})
    if "mask" in known:
        return {key: known[key] for key in ("mask", "entries")}
    total = hashlib.blake2b(digest_size=8)
    for name in sorted(mask):
        total.update(f"{name} {mask[name].numel()}".encode())
        total.update(mask[name].cpu().numpy().data)
    return {"mask": total.hexdigest(), "entries": mask.k}


def _part(mask: Mask, indices: Mapping[str, Tensor], workers: Mapping[str, Any]) -> Mask:
    return Mask(
        indices,
        mask.shapes,
        dense=mask.dense,
        aliases=mask.aliases,
        info={**mask.info, "workers": dict(workers)},
        fingerprint=mask.fingerprint,
    )
