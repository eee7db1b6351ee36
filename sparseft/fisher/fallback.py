"""The fallback, for the parameters that no rule captures: whole gradients of single samples. Exact, and slow.

`torch.func` takes several samples at a time where it can. It cannot follow all code, and a batching rule may be wrong,
so it must agree with autograd on some samples first, where these have a gradient. Where it does not, autograd runs all
of them, one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparseft.fisher import vmapped
from sparseft.fisher.batches import Batch, take
from sparseft.fisher.coupling import company, precision, scales
from sparseft.fisher.loss import Objective, Pullback

# of a gradient's largest entry: twice that is of its square. Coarser precision: in units of rounding
_TOLERANCE, _COARSE = 5e-6, 16
# some gradients (of a key's bias) are zero but for rounding: a share of the largest of all
_FLOOR = 1e-3
# samples that are tried together, and of these compared with autograd, at least
_TRIED, _COMPARED = 8, 2
_UNTOLD = 3  # batches with nothing to compare after which no other is tried
_Gradients = dict[str, Tensor]


class Fallback:
    """Makes gradients of single samples.

    Args:
        model: in evaluation mode, with gradients for the parameters alone.
        objective: what is differentiated.

    Attributes:
        way: how they are made, in words; "" before the first.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self._model, self._objective = model, objective
        self._agreed: set[str] = set()  # parameters for which torch.func and autograd were seen to give the same
        self._refused = False
        self._untold = 0  # batches that could not tell
        self.way = ""
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            self._refuse("torch.func would take the kernels of recurrent layers apart")

    def gradients(
        self, batch: Batch, pullback: Pullback, parameters: Mapping[str, Tensor], composed: int, eps: float
    ) -> Iterator[tuple[Sequence[int], _Gradients]]:
        """Yield (samples of the batch, by index, and name -> fp32 [n, ...]), until all have had all gradients.

        There is one for each cotangent. What the loss does not depend on is zero, or not there.

        Args:
            batch: of samples whose loss is finite.
            pullback: of the batch.
            parameters: whose gradients, by name.
            composed: bytes of what is computed from them alone.
            eps: of the coarsest precision that the model computes in.
        """
        count, done = len(pullback.outputs), 0
        room = vmapped.room(parameters, len(pullback.cotangents), composed, pullback.outputs.device)
        if self._serves(batch, pullback, parameters, room, eps):
            for start in range(0, count, room):
                samples = range(start, min(start + room, count))
                found = self._several(batch, samples, pullback, parameters)
                if found is None:
                    break
                for grads in found:
                    yield samples, grads
                done = samples.stop
        for index in range(done, count):
            for grads in self._single(batch, index, pullback, parameters):
                yield [index], {name: grad[None] for name, grad in grads.items()}

    def _single(
        self, batch: Batch, index: int, pullback: Pullback, parameters: Mapping[str, Tensor]
    ) -> Iterator[_Gradients]:
        """Yield the gradients of one sample, name -> fp32, for each cotangent; those that are None left out."""
        targets = None if pullback.targets is None else pullback.targets[index, None]
        outputs = self._objective.outputs(self._model, take(batch, [index]), targets)
        for left, cotangent in enumerate(pullback.cotangents, 1 - len(pullback.cotangents)):
            row = cotangent[index, None]
            if not outputs.requires_grad or not bool(row.any()):
                yield {}
                continue
            grads = torch.autograd.grad(
                outputs, list(parameters.values()), row, retain_graph=left < 0, allow_unused=True
            )
            named = zip(parameters, grads, strict=True)
            yield {name: grad.to_dense().float() for name, grad in named if grad is not None}

    def _several(
        self, batch: Batch, samples: Sequence[int], pullback: Pullback, parameters: Mapping[str, Tensor]
    ) -> list[_Gradients] | None:
        """Return for each cotangent the gradients of some samples, name -> fp32 [n, ...]; None if that is refused."""
        try:
            return vmapped.Vmapped(self._model, self._objective, batch, pullback, parameters).gradients(samples)
        except RuntimeError as error:
            self._refuse(f"torch.func refuses the model ({str(error).splitlines()[0]})")
            return None

    def _serves(
        self, batch: Batch, pullback: Pullback, parameters: Mapping[str, Tensor], room: int, eps: float
    ) -> bool:
        """Return whether torch.func is to be used."""
        if any(parameter._backward_hooks for parameter in parameters.values()):
            self._refuse("torch.func runs no hooks on gradients of parameters")
        if self._refused:
            return False
        if not room:
            self.way = self.way if self._agreed else _one_by_one("several would take too much memory")
            return False
        if len(pullback.outputs) < 2:
            self.way = self.way or _one_by_one("no batch had two")
            return False
        if not parameters.keys() <= self._agreed:
            self._try(batch, pullback, parameters, room, eps)
        if self._refused or not parameters.keys() <= self._agreed:
            return False
        self.way = "several samples at a time, by torch.func"
        return True

    def _try(self, batch: Batch, pullback: Pullback, parameters: Mapping[str, Tensor], room: int, eps: float) -> None:
        """Compare torch.func with autograd on two samples, more if these have no gradient in some parameters."""
        # some together, as they will be
        samples = list(dict.fromkeys([*company(batch), *range(len(pullback.outputs))]))[: min(room, _TRIED)]
        # one gradient of a sample stands for all: they take the same operations
        once = replace(pullback, cotangents=[sum(pullback.cotangents[1:], pullback.cotangents[0])])
        named = {**parameters, **scales(self._model)}
        wanted: list[_Gradients] = []
        largest, told = 0.0, set(self._agreed)
        for index in samples:
            if len(wanted) >= _COMPARED and parameters.keys() <= told:
                break
            wanted.append(next(self._single(batch, index, once, named)))
            sizes = {name: float(grad.abs().max()) for name, grad in wanted[-1].items()}
            if not all(map(math.isfinite, sizes.values())):
                wanted[-1] = {}
                continue
            largest = max(largest, *sizes.values(), 0.0)
            told |= {name for name, size in sizes.items() if size}
        untold = [name for name in parameters if name not in told]
        if untold:
            self._untold += 1
            self.way = self.way if self._agreed else _one_by_one(f"{untold[0]} had no gradient to compare")
            if self._untold == _UNTOLD:
                self._refuse(f"{untold[0]} had no gradient to compare")
            return
        found = self._several(batch, samples, once, parameters)
        if found is None:
            return
        eps = precision(pullback.outputs, max(eps, *(torch.finfo(p.dtype).eps for p in parameters.values())))
        tolerance = _TOLERANCE if eps <= torch.finfo(torch.float32).eps else _COARSE * eps
        for row, grads in enumerate(wanted):
            for name in parameters if grads else ():
                got = found[0][name][row]
                grad = grads.get(name, torch.zeros_like(got))
                error = float((got - grad).abs().max()) / max(float(grad.abs().max()), _FLOOR * largest)
                if not error <= tolerance:
                    self._refuse(f"torch.func gives another gradient of {name}, off by {error:.1e} of its largest")
                    return
        self._agreed |= parameters.keys()

    def _refuse(self, why: str) -> None:
        self._refused, self.way = True, _one_by_one(why)


def _one_by_one(why: str) -> str:
    return f"one sample at a time: {why}"
