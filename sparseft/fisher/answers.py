"""What a model asks of a value, under a transform of `torch.func`, which has one for each sample and so has no answer.

Masks of padding ask whether there is any. Samples that answer alike can go on together: each does what it would do
alone. Those that do not are told apart, and run again with their like.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch._C import _functorch as functorch
from torch.overrides import TorchFunctionMode

from sparseft.fisher.nest import tensors

_QUESTIONS: dict[Callable[..., Any], Callable[[Any], Any]] = {
    Tensor.__bool__: bool,
    Tensor.__int__: int,
    Tensor.__float__: float,
    Tensor.__index__: operator.index,
    Tensor.item: lambda value: value,
}
_TEXTS = (Tensor.__repr__, Tensor.__format__)  # which torch gives, but not of a sample's value


class Disagreement(BaseException):
    """Some samples say yes, and others no. A model that catches errors must not take this for one.

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
        replaced: parameters that have another tensor in their place; one that is used nevertheless is an error.

    Attributes:
        made: tensors of the transform.

    Raises:
        Disagreement: they say yes and no. Where they have different numbers, torch's own error is raised.
    """

    def __init__(self, samples: int, replaced: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._samples = samples
        self._replaced = {id(tensor): name for name, tensor in replaced.items()}
        self._failure: Callable[[], BaseException] | None = None
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            result = self._run(func, args, kwargs or {})
        except Disagreement as error:
            groups = error.groups
            self._failure = lambda: _disagreement(groups)
            raise
        except Exception as error:
            said = str(error)
            self._failure = lambda: RuntimeError(said)
            raise
        made = [tensor for tensor in tensors(result) if functorch.is_functorch_wrapped_tensor(tensor)]
        self.made += map(weakref.ref, made)
        return result

    def check(self) -> None:
        """Raise what was raised in the model, and caught there: samples may have gone a way that is not theirs."""
        if self._failure is not None:
            raise self._failure()

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # its shape and dtype may be looked at
            for tensor in tensors((args, kwargs)):
                if id(tensor) in self._replaced:
                    raise RuntimeError(f"{self._replaced[id(tensor)]} is held in more than one place")
        if (func in _QUESTIONS or func in _TEXTS) and functorch.is_functorch_wrapped_tensor(args[0]):
            if func in _TEXTS:
                raise RuntimeError("a text is made of a value")
            answers = [_QUESTIONS[func](value) for value in _values(args[0])]
            if len(answers) in (1, self._samples):
                if len(set(answers)) == 1:
                    return answers[0]
                if all(isinstance(answer, bool) for answer in answers):
                    raise Disagreement(answers)
        return func(*args, **kwargs)


def _disagreement(groups: list[list[int]]) -> Disagreement:
    return Disagreement([place in groups[0] for place in range(sum(map(len, groups)))])


def _values(tensor: Tensor) -> list[Any]:
    """Return what a tensor holds under all transforms."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    values = tensor.tolist()
    while isinstance(values, list) and values and isinstance(values[0], list):
        values = [value for row in values for value in row]
    return values if isinstance(values, list) else [values]
