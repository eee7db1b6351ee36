"""Several workers, each of which trains a part of the entries by itself, and what they learned put together.

Each worker trains a mask of its own from the same base, without communication; as masks are disjoint, the union of
what changed is what all of them learned. Then the next round may begin, with new masks. Source: the distributed
training of FISH Mask, arXiv 2111.09839.

masks = workers.disjoint_masks(model, scores, 4, density=0.005)    # or workers.split(mask, 4)
...                                                                # each worker: train, and Delta.of(model, masks[i])
workers.merge(deltas).apply(model)                                 # or, in processes that train at once:
workers.exchange(model, masks)

Differences from the published code are in docs/methods.md.
"""

from sparseft.workers.exchange import exchange
from sparseft.workers.merging import Overlap, merge
from sparseft.workers.parts import disjoint_masks, split

__all__ = ["Overlap", "disjoint_masks", "exchange", "merge", "split"]
