"""A parameter whose gradient exists at its selected entries only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.compact import embedding, linear
from sparseft.compact.selection import Selection
from sparseft.compact.stepping import write
from sparseft.entries import SelectedEntries

# operations that compute no more of the gradient than they must; all others take the dense one of one tensor
RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {**linear.RULES, **embedding.RULES}


def _about_tensors() -> Iterator[Callable[..., Any]]:
    """Yield the functions that are about a tensor itself and not its values, and those that change it in place."""
    named = set(
        "__len__ __repr__ __format__ __hash__ detach register_hook register_post_accumulate_grad_hook size dim "
        "ndimension numel nelement stride storage_offset element_size data_ptr untyped_storage get_device".split()
    )
    for name in dir(Tensor):
        attribute = getattr(Tensor, name)
        if name in named or name.startswith(("is_", "_is_")) or (name.endswith("_") and not name.endswith("__")):
            yield attribute
        # properties arrive as one of their methods; some are views of the values
        if inspect.isdatadescriptor(attribute) and name not in ("T", "mT", "H", "mH", "real", "imag"):
            yield from (getattr(attribute, way) for way in ("__get__", "__set__", "__delete__"))


_PLAIN = frozenset(_about_tensors())
_FREEZING = frozenset((Tensor.requires_grad_, Tensor.requires_grad.__set__))  # type: ignore[attr-defined]
_IN_PLACE = frozenset(getattr(Tensor, name) for name in dir(Tensor) if name.endswith("_") and not name.endswith("__"))


class CompactParameter(nn.Parameter):
    """A parameter while its gradients are compact: operations on it pass gradients to a leaf of its selected entries.

    An instance is an ordinary parameter whose class was changed, so that everybody who holds it sees the change, and
    changes back. Freezing it freezes the leaf, and unfreezing it unfreezes the leaf.
    """

    selection: Selection
    selected_entries: SelectedEntries

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_dynamo_compiling():
                # a graph drops what is tied for nothing, and cannot look functions up
                plain = False
            else:
                plain = func in _PLAIN and not (func in _IN_PLACE and not isinstance(args[0], CompactParameter))
                if not plain:
                    _bring_up_to_date(args)
                    _bring_up_to_date(kwargs.values())
                elif func in _FREEZING:
                    return _freeze(func, *args, **kwargs)
            if torch.is_grad_enabled():
                transformed = torch._C._are_functorch_transforms_active()
                rule = None if transformed else RULES.get(func)
                result = None if rule is None else rule(*args, **kwargs)
                if result is not None:
                    return result
                if not plain:
                    tie = _composed if transformed else Selection.tied
                    args, kwargs = _tied(args, tie), _tied(kwargs, tie)
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Copy the parameter as it was before, gradients and all."""
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        copied: nn.Parameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


def _freeze(func: Callable[..., Any], parameter: CompactParameter, *args: Any, **kwargs: Any) -> Any:
    result = func(parameter, *args, **kwargs)
    parameter.selected_entries.requires_grad_(parameter.requires_grad)
    return result


def _bring_up_to_date(values: Iterable[Any]) -> None:
    """Write leaves that were changed outside of a step, or in the middle of one, before their weights are used."""
    for value in values:
        if isinstance(value, CompactParameter) and value.selected_entries.changed:
            write([value.selected_entries])
        elif isinstance(value, (list, tuple)):
            _bring_up_to_date(value)


def _tied(value: Any, tie: Callable[[Selection, CompactParameter], Tensor]) -> Any:
    """Return arguments, with every compact parameter replaced by a tensor whose gradient reaches the leaf."""
    if isinstance(value, CompactParameter):
        return tie(value.selection, value)
    if isinstance(value, (list, tuple)):
        items = [_tied(item, tie) for item in value]
        return type(value)(items) if type(value) in (list, tuple) else type(value)(*items)
    if type(value) is dict:
        return {key: _tied(item, tie) for key, item in value.items()}
    return value


def _composed(selection: Selection, parameter: Tensor) -> Tensor:
    """Return a parameter as a function of its leaf, in operations that every transform of `torch.func` knows."""
    leaf = selection.entries
    values, at = parameter.detach().reshape(-1), (leaf.positions.long(),)
    moved = values[at] + (leaf - leaf.detach()).to(values.dtype)
    return values.index_put(at, moved).view(parameter.shape)
