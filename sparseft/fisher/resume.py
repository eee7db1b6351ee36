"""Going on: scores of earlier samples are joined with those of later ones; a long pass survives an interruption."""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseft.fisher.batches import Batch, size, take, tensors
from sparseft.fisher.report import FisherReport, FisherScores

_Settings = Mapping[str, str | float]


class Continuation:
    """What a pass goes on from, if anything, and where it saves how far it came.

    Args:
        resume: scores of samples that came before the data, or their file.
        checkpoint: file of the scores of the data's first samples, read if it is there, written as the pass proceeds.
        seconds: between two writes.
        parameters: what the pass scores.
        report: how it does.

    Raises:
        ValueError: both are given, or they come from another model, other parameters or other options.
    """

    def __init__(
        self,
        resume: FisherScores | str | os.PathLike[str] | None,
        checkpoint: str | os.PathLike[str] | None,
        seconds: float,
        parameters: Mapping[str, Tensor],
        report: FisherReport,
    ) -> None:
        if resume is not None and checkpoint is not None:
            raise ValueError(
                "resume= goes on after the samples of earlier scores, checkpoint= from the start of the same data: "
                "give one of them"
            )
        self._path = None if checkpoint is None else Path(checkpoint)
        if self._path is not None and not self._path.parent.is_dir():
            raise ValueError(f"the folder of the checkpoint {self._path} must be there before the pass; create it")
        self._seconds, self._saved_at = seconds, time.monotonic()
        self._report = report
        self._checksum = self._next = 0  # of the samples before the batch under way, and with it
        found = self._path if self._path is not None and self._path.exists() else resume
        self._earlier = found if found is None or isinstance(found, FisherScores) else FisherScores.load(found)
        if self._earlier is not None:
            _check_same(self._earlier, parameters, report)

    @property
    def saves(self) -> bool:
        """Whether there is to be a checkpoint."""
        return self._path is not None

    @property
    def skipped(self) -> int:
        """How many samples at the start of the data are in the checkpoint already."""
        return self._earlier.report.seen if self._earlier is not None and self._path is not None else 0

    def rest(self, batch: Batch, positions: list[int]) -> tuple[Batch, list[int]]:
        """Return what is left to do of a batch, and the positions of its samples, counted from the earlier ones.

        The batch is under way then, until `done` is called.
        """
        if self._path is None:
            start = self._earlier.report.seen if self._earlier is not None else 0
            return batch, [start + position for position in positions]
        known = min(max(self.skipped - positions[0], 0), len(positions))
        self._next = _checksum(batch, range(known), self._checksum)
        if known and positions[known - 1] == self.skipped - 1:
            self._check_data()
        self._next = _checksum(batch, range(known, len(positions)), self._next)
        return (take(batch, range(known, len(positions))) if known else batch), positions[known:]

    def check_settings(self) -> None:
        """Raise if a batch showed that the scores are not made as the earlier ones were."""
        _check_unchanged(self.changed())

    def changed(self) -> list[str]:
        """Return what differs from the earlier scores' settings, once a batch has shown whether autocast is on."""
        if self._earlier is None:
            return []
        before, now = self._earlier.report.settings, self._report.settings
        return _changed(before, now, {**before, **now})

    def done(self) -> None:
        """Count the batch under way among the samples that a checkpoint holds."""
        self._checksum = self._next

    def due(self) -> bool:
        """Return whether it is time to save."""
        return self._path is not None and time.monotonic() - self._saved_at >= self._seconds

    def joined(self, scores: FisherScores) -> FisherScores:
        """Return the mean over earlier and new samples; it may be made in the new scores' memory."""
        scores.report.data = self._checksum
        return scores if self._earlier is None else _mean(self._earlier, scores)

    def save(self, scores: FisherScores) -> None:
        """Write the checkpoint, if there is to be one and a sample to put in."""
        if self._path is not None and scores.report.samples:
            scores.save(self._path)
        self._saved_at = time.monotonic()

    def end(self, count: int) -> None:
        """Raise if the data ended before the checkpoint's samples did; count: how many samples it gave."""
        if count < self.skipped:
            raise ValueError(
                f"the checkpoint {self._path} holds {self.skipped} samples, but only {count} were asked for or are in "
                "the data; give as many, or another file"
            )

    def _check_data(self) -> None:
        if self._earlier is not None and self._earlier.report.data != self._next:
            raise ValueError(
                f"the data must begin with the {self.skipped} samples that are in the checkpoint {self._path}, in the "
                "same order and with the same padding, but these differ; fix the seed of a loader that shuffles and "
                "keep its batch size, or give another file"
            )


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the model's weights and persistent buffers, the same on every device.

    It reads memory once: 64-bit words are summed per tensor, and the sums are hashed.
    """
    kept = set(model.state_dict())
    held = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in kept)]
    parts = [f"{name} {tensor.dtype} {list(tensor.shape)} {_sum_of_bits(tensor)}" for name, tensor in held]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _sum_of_bits(tensor: Tensor) -> int:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    if data.storage_offset() % 8:
        data = data.clone()
    words = int(data[:whole].view(torch.int64).sum())
    return words if whole == data.numel() else words + int(data[whole:].sum())


def _checksum(batch: Batch, samples: Iterable[int], start: int) -> int:
    count = size(batch)
    rows = [tensor.detach().cpu() for tensor in tensors(batch).values() if tensor.dim() and len(tensor) == count]
    for sample in samples:
        for tensor in rows:
            start = zlib.crc32(tensor[sample].contiguous().view(-1).view(torch.uint8).numpy().data, start)
    return start


def _check_same(earlier: FisherScores, parameters: Mapping[str, Tensor], report: FisherReport) -> None:
    # whether autocast is on, the first batch shows
    _check_unchanged(_changed(earlier.report.settings, report.settings, report.settings))
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    others = sorted({*shapes, *earlier} - {name for name in earlier if shapes.get(name) == earlier[name].shape})
    if others:
        raise ValueError(
            f"earlier scores must be of the same parameters to go on from, got differences in {others[:4]}; pass the "
            "same `names`"
        )
    if earlier.report.fingerprint != report.fingerprint:
        raise ValueError(
            f"earlier scores must be of the same weights to go on from: their fingerprint was "
            f"{earlier.report.fingerprint}, the model's is {report.fingerprint}; load the weights they were made with"
        )


def _changed(before: _Settings, now: _Settings, keys: Iterable[str]) -> list[str]:
    return [f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)]


def _check_unchanged(changed: list[str]) -> None:
    if changed:
        raise ValueError(
            f"earlier scores must be made with the same options to go on from: {', '.join(changed)}; "
            "start anew, or give them back their values"
        )


def _mean(earlier: FisherScores, scores: FisherScores) -> FisherScores:
    """Return the mean over both, weighted by samples, in the memory of `scores`."""
    before, now = earlier.report, scores.report
    if now.samples and now.loss != before.loss:
        raise ValueError(
            f"earlier scores must be of the same loss to go on from: it was {before.loss}, now {now.loss}"
        )
    total = max(before.samples + now.samples, 1)
    for name, score in scores.items():
        score.mul_(now.samples / total).add_(earlier[name].to(score.device), alpha=before.samples / total)
    joined = FisherReport(
        now.mode,
        before.loss or now.loss,
        before.positions + now.positions,
        before.dropped + now.dropped,
        {name: _both(before.rules[name], rule) for name, rule in now.rules.items()},
        {**before.fallback, **now.fallback},
        now.way or before.way,
        now.aliases,
        # where nothing was left to run, only the earlier ones tell of autocast
        {**before.settings, **now.settings},
        now.fingerprint,
        now.data,
    )
    return FisherScores(dict(scores), joined)


def _both(one: str, other: str) -> str:
    rules = {*one.split(" + "), *other.split(" + ")} - {"unused"}
    return " + ".join(sorted(rules)) or "unused"
