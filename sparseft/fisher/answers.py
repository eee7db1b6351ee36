"""What a model asks of a value, under a transform of `torch.func`, which has one for each sample and so has no answer.

Masks of padding ask whether there is any. Samples that answer alike can go on together: each does what it would do
alone. Those that do not are told apart, and run again with their like.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._C import _functorch as functorch
from torch.overrides import TorchFunctionMode

_QUESTIONS: dict[Callable[..., Any], Callable[[Any], Any]] = {
    Tensor.__bool__: bool,
    Tensor.__int__: int,
    Tensor.__float__: float,
    Tensor.__index__: operator.index,
    Tensor.item: lambda value: value,
}


class Disagreement(Exception):
    """Some samples say yes, and others no.

    Attributes:
        groups: those that agree, by their places.
    """

    def __init__(self, answers: list[bool]) -> None:
        super().__init__("samples go different ways")
        self.groups = [[n for n, answer in enumerate(answers) if answer is one] for one in (True, False)]


class Answers(TorchFunctionMode):
    """Answers for all samples that a `vmap` takes together.

    Args:
        samples: how many.

    Raises:
        Disagreement: they say yes and no. Where they have different numbers, torch's own error is raised.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self._samples = samples

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _QUESTIONS and functorch.is_functorch_wrapped_tensor(args[0]):
            answers = [_QUESTIONS[func](value) for value in _values(args[0])]
            if len(answers) in (1, self._samples):
                if len(set(answers)) == 1:
                    return answers[0]
                if all(isinstance(answer, bool) for answer in answers):
                    raise Disagreement(answers)
        return func(*args, **(kwargs or {}))


def _values(tensor: Tensor) -> list[Any]:
    """Return what a tensor holds under all transforms."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    values = tensor.tolist()
    while isinstance(values, list) and values and isinstance(values[0], list):
        values = [value for row in values for value in row]
    return values if isinstance(values, list) else [values]
