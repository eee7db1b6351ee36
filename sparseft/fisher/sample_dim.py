"""Where the samples are in a batch that is not batch-first: time-major sequences [T, N, ...], for instance."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparseft.fisher.batches import Batch, each, tensors


class SampleDim:
    """Turns batches so that samples are the first dimension of every tensor, and back to what the model takes.

    Args:
        named: the dimension that counts samples: one for all tensors (the first, for those that have fewer), or by
            path ("src", "labels", "0" for the first of a tuple; the first dimension for the others). None finds it in
            the first batch: where leading sizes disagree, it is the one size that every tensor has exactly once among
            its first two dimensions.
    """

    def __init__(self, named: int | Mapping[str, int] | None = None) -> None:
        dims = named.values() if isinstance(named, Mapping) else [named or 0]
        if any(isinstance(dim, bool) or not isinstance(dim, int) or dim < 0 for dim in dims):
            raise ValueError(f"batch_dim must be a dimension, 0 or more, or a mapping of paths to them, got {named!r}")
        self._named = named
        self._checked = False

    def first(self, batch: Batch) -> Batch:
        """Return a batch of the data with its samples in the first dimension of every tensor."""
        if not self._checked:
            self._check(tensors(batch))
        if not self._named:
            return batch
        return each(batch, lambda tensor, path: tensor.movedim(self.of(path, tensor), 0) if tensor.dim() else tensor)

    def back(self, batch: Batch) -> Batch:
        """Return what `first` was given."""
        if not self._named:
            return batch
        return each(batch, lambda tensor, path: tensor.movedim(0, self.of(path, tensor)) if tensor.dim() else tensor)

    def of(self, path: str, tensor: Tensor) -> int:
        """Return the dimension that counts samples in the tensor at a path of the data."""
        if isinstance(self._named, Mapping):
            return self._named.get(path, 0)
        return self._named if self._named and self._named < tensor.dim() else 0

    def _check(self, found: Mapping[str, Tensor]) -> None:
        if self._named is None:
            self._named = _by_shape(found)
        elif isinstance(self._named, Mapping):
            wrong = [path for path, dim in self._named.items() if path not in found or found[path].dim() <= dim]
            if wrong:
                shapes = {path: list(tensor.shape) for path, tensor in found.items()}
                raise ValueError(f"batch_dim must name dimensions of the batch's tensors {shapes}, got {self._named}")
        self._checked = True


def _by_shape(found: Mapping[str, Tensor]) -> dict[str, int]:
    shapes = {path: tuple(tensor.shape[:2]) for path, tensor in found.items() if tensor.dim() and tensor.shape[0] != 1}
    if len({shape[0] for shape in shapes.values()}) < 2:
        return {}
    common = set.intersection(*(set(shape) for shape in shapes.values()))
    counts = [size for size in common if all(shape.count(size) == 1 for shape in shapes.values())]
    # left as it is, the batch is refused where its samples are counted
    return {path: shape.index(counts[0]) for path, shape in shapes.items()} if len(counts) == 1 else {}
