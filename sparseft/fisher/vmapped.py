"""Whole gradients of several samples at a time, by `torch.func`: `vmap` over samples of a `vjp` in the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch.func import functional_call, vjp, vmap

from sparseft.fisher.answers import Answers, Disagreement
from sparseft.fisher.batches import Batch, each, take, tensors
from sparseft.fisher.escapes import attributes_kept, released
from sparseft.fisher.loss import Objective, Pullback

# Device -> bytes for the gradients of the samples that are taken at a time, and the fewest that this is worth it for.
# What is spared is the start of operations, of which a GPU has the more; a CPU writes large gradients of many samples
# to memory, and those of one to its cache.
_ROOM = {"cpu": (32 * 2**20, 8)}
_ROOM_OF_GPU = (256 * 2**20, 2)


def room(parameters: Mapping[str, Tensor], cotangents: int, composed: int, device: torch.device) -> int:
    """Return how many samples are to be taken at a time; 0 if there is no room for as many as are worth it.

    composed: bytes of what is computed from these parameters alone; of that, too, each sample has a gradient.
    """
    size, fewest = _ROOM.get(device.type, _ROOM_OF_GPU)
    own = sum(4 * parameter.numel() for parameter in parameters.values())
    samples = size // max(cotangents * own + composed, 1)
    return samples if samples >= fewest else 0


@dataclass(frozen=True)
class Vmapped:
    """Makes gradients of samples of one batch.

    Attributes:
        model: in evaluation mode.
        objective: made the pullback.
        batch: what it was made of.
        pullback: what to pull back.
        parameters: of the model, by name.
    """

    model: nn.Module
    objective: Objective
    batch: Batch
    pullback: Pullback
    parameters: Mapping[str, Tensor]

    def gradients(self, samples: Sequence[int], questions: int = 3) -> list[dict[str, Tensor]]:
        """Return for each cotangent of the pullback the gradients of some samples: name -> fp32 [n, ...].

        Args:
            samples: of the batch, by index.
            questions: how many of the model's questions may tell samples apart, each in two.

        Raises:
            RuntimeError: code that a transform of `torch.func` cannot follow, or that keeps tensors of it.
        """
        answers = Answers(len(samples), self.parameters)
        groups, said = None, ""
        try:
            found = self._together(samples, answers)
        except Disagreement as error:
            groups = error.groups
        except Exception as error:  # noqa: BLE001  (raised below, without the frames that hold tensors)
            said = f"{type(error).__name__}: {error}".strip()
        if not released(answers.made):
            raise RuntimeError("code keeps tensors of a forward pass")
        if said:
            raise RuntimeError(said)
        if groups is None:
            return found
        if not questions:
            raise RuntimeError("samples go too many ways")
        apart = [self.gradients([samples[place] for place in group], questions - 1) for group in groups]
        places = [place for group in groups for place in group]
        order = torch.tensor(places, device=self.pullback.outputs.device).argsort()
        return [
            {name: torch.cat([grads[name] for grads in of_groups])[order] for name in self.parameters}
            for of_groups in zip(*apart, strict=True)
        ]

    def _together(self, samples: Sequence[int], answers: Answers) -> list[dict[str, Tensor]]:
        part, pullback = take(self.batch, samples), self.pullback
        inputs = {path: t for path, t in tensors(part).items() if t.dim() and t.shape[0] == len(samples)}
        index = torch.tensor(list(samples), device=pullback.outputs.device)
        call = _Outputs(self.model, self.objective)
        chosen = {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}

        def pulled(inputs: dict[str, Tensor], rest: dict[str, Any]) -> list[dict[str, Tensor]]:
            one = each(part, lambda tensor, path: inputs[path][None] if path in inputs else tensor)
            targets = rest["targets"][None] if "targets" in rest else None
            _, pull, *_ = vjp(lambda chosen: functional_call(call, chosen, (one, targets))[0], chosen)
            return [pull(cotangent)[0] for cotangent in rest["cotangents"]]

        rest: dict[str, Any] = {"cotangents": [cotangent[index] for cotangent in pullback.cotangents]}
        if pullback.targets is not None:
            rest["targets"] = pullback.targets[index]
        # without grad mode no second graph is recorded, of the parameters that are not chosen
        with attributes_kept(self.model), torch.no_grad(), _quiet(), answers:
            found = vmap(pulled)(inputs, rest)
        answers.check()
        return [{name: grads[f"model.{name}"].float() for name in self.parameters} for grads in found]


class _Outputs(nn.Module):
    """A module around a model, for `functional_call`: losses may call parts of a model instead of the whole."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self._objective = model, objective

    def forward(self, batch: Batch, targets: Tensor | None) -> Tensor:
        return self._objective.outputs(self.model, batch, targets)


@contextmanager
def _quiet() -> Iterator[None]:
    """Say nothing of operations without a batching rule: each runs sample by sample, the others do not."""
    functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]
