"""What every schedule is: it watches the steps of one optimizer, and changes which entries that trains."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparseft.entries import check_no_entries
from sparseft.index_lists import count
from sparseft.mask import Mask, check_mask
from sparseft.optim.base import SparseOptimizer
from sparseft.optim.clipping import gradient_norm
from sparseft.schedules.states import ANY, check_counts, check_parts, mask_from_state, mask_state
from sparseft.selection.arguments import check_model

if TYPE_CHECKING:
    from typing_extensions import Self

# optimizers hold their schedules, in the hooks of their steps
_scheduled: weakref.WeakSet[SparseOptimizer] = weakref.WeakSet()


class Schedule:
    """Base of the schedules: counts the steps of an optimizer, and acts before and after them.

    Only steps count: accumulation, forward passes without a step and recomputation do not. A step whose selected
    gradients are not finite, or that GradScaler leaves out, changes nothing: not the weights, not what the schedule
    knows, and it counts in `skipped` alone. That takes the norm of the selected gradients, and one wait for the device
    a step. Data-parallel processes agree, as long as their gradients are averaged before the step.

    To resume, make model, optimizer and schedule as at the beginning, and load the schedule's state before the
    optimizer's: that brings the mask that the other's state belongs to.

    Attributes:
        mask: what the optimizer trains now.
        steps: steps that were taken.
        skipped: steps that were left out.
    """

    def __init__(self, model: nn.Module, optimizer: SparseOptimizer, mask: Mask) -> None:
        """Watch an optimizer that trains the entries of a mask.

        Raises:
            RuntimeError: the optimizer has a schedule, or the model's gradients are compact.
            TypeError: the optimizer is of another package, or the model or the mask is none.
            ValueError: the optimizer trains other entries than the mask's, or another model.
        """
        check_model(model)
        if not isinstance(optimizer, SparseOptimizer):
            raise TypeError(
                f"a schedule changes masks, which optimizers of this package have, got {type(optimizer).__name__}; "
                "use SparseAdamW, SparseSGD or SparseLion"
            )
        if optimizer in _scheduled:
            raise RuntimeError("the optimizer has a schedule already; close() that one first, or use one of the two")
        check_no_entries(model)
        check_mask(mask)
        self.model, self.optimizer = model, optimizer
        self.steps = self.skipped = 0
        self._step_is_good: bool | None = None
        self._flag: Tensor | None = None
        self._check_trains(mask)
        self._set_mask(mask)
        parameters = dict(model.named_parameters())
        self._parameters = {
            name: (parameters[name], parameters[name].shape, parameters[name].dtype)
            for name in (*mask.shapes, *mask.dense)
        }
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        _scheduled.add(optimizer)

    def close(self) -> None:
        """Stop watching: the optimizer goes on with the mask that it has.

        It warns of a run that ends before the choice that it was to come to, as leaving the context does.
        """
        try:
            self._warn_of_no_choice()
        finally:
            # also where warnings are errors
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._warn_of_no_choice()
        finally:
            self._stop()

    def state_dict(self) -> dict[str, Any]:
        """Return what the schedule knows, in tensors, numbers and names: references, as an optimizer's has them."""
        return {
            "options": self._options(),
            "steps": self.steps,
            "skipped": self.skipped,
            "mask": mask_state(self.mask),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another schedule of the same options was; the optimizer's state is to be loaded after this.

        Raises:
            ValueError: the options or the parameters to choose from are others, or the state is damaged; nothing was
                changed.
        """
        check_parts("", state, dict.fromkeys(self.state_dict(), ANY))
        if state["options"] != self._options():
            raise ValueError(
                f"the state must be of a {type(self).__name__} with {self._options()}, got {state['options']}; make "
                "the schedule with the options of the saved one"
            )
        check_counts(state)
        mask = mask_from_state(state["mask"], self.mask)
        self._check_state(state, mask)
        self._set_mask(mask)
        self.steps, self.skipped = state["steps"], state["skipped"]
        self._load(state)

    def _options(self) -> dict[str, Any]:
        """Return the options that a state must agree with, as plain values."""
        raise NotImplementedError

    def _check_state(self, state: dict[str, Any], mask: Mask) -> None:
        """Raise unless the parts of a state that a schedule adds are whole. mask: the state's."""

    def _load(self, state: dict[str, Any]) -> None:
        """Take over the parts of a state that a schedule adds, once it is checked and the mask is the state's."""

    def _awaited(self) -> tuple[int, str] | None:
        """Return the step whose choice a run must not end before, and the option that says so; None where none is."""
        return None

    def _warn_of_no_choice(self) -> None:
        step, option = self._awaited() or (0, "")
        if self._handles and 0 < self.steps < step:
            warnings.warn(
                f"{type(self).__name__} ended after {self.steps:,} steps, before its choice at step {step:,}: "
                f"{self.mask.k:,} of {self.mask.n:,} entries train, and a delta would hold these; train for longer, "
                f"or have it choose after fewer steps ({option})",
                stacklevel=3,
            )

    def _stop(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._take_flag_back()
        _scheduled.discard(self.optimizer)

    def _before_step(self) -> None:
        """Do what there is to do before a step that counts, with its gradients, and weights that are not changed."""

    def _after_step(self) -> None:
        """Do what there is to do after a step that counts; its gradients are still there."""
        raise NotImplementedError

    def _set_mask(self, mask: Mask) -> None:
        self.optimizer.set_mask(mask, self.model)
        self.mask = mask
        self._lists = self._lists_of_optimizer()

    def _lists_of_optimizer(self) -> dict[Tensor, Tensor]:
        groups = self.optimizer.param_groups
        return {
            param: index for group in groups for param, index in zip(group["params"], group["indices"], strict=True)
        }

    def _check_trains(self, mask: Mask) -> None:
        """Raise unless the optimizer trains the mask's entries."""
        mask.check(self.model)
        lists, parameters = self._lists_of_optimizer(), dict(self.model.named_parameters())
        for name in (*mask, *mask.dense):
            index, numel = lists.get(parameters[name]), parameters[name].numel()
            if name in mask.dense:
                agrees = index is not None and count(index, numel) == numel
            else:
                agrees = index is not None and torch.equal(index.cpu(), mask.index_list(name).cpu())
            if not agrees:
                raise ValueError(
                    f"the optimizer must train what the schedule begins with, {mask.k:,} entries of {len(mask)} "
                    f"parameters and {len(mask.dense)} whole ones, got {'no' if index is None else 'other'} entries "
                    f"of {name}; make the optimizer for them, and the schedule before states are loaded"
                )

    def _check_model(self) -> None:
        """Raise if the model has other parameters than the optimizer, or parameters of other shapes or dtypes."""
        now = dict(self.model.named_parameters())
        for name, (parameter, shape, dtype) in self._parameters.items():
            if now.get(name) is not parameter:
                raise RuntimeError(
                    f"{name} of the model is not the parameter that the optimizer trains: it was replaced since "
                    f"{type(self).__name__} was made, as load_state_dict(assign=True) does; make optimizer and "
                    "schedule after that, or load without assign"
                )
            if (parameter.shape, parameter.dtype) != (shape, dtype):
                raise RuntimeError(
                    f"{name} was {dtype} {list(shape)} and is {parameter.dtype} {list(parameter.shape)}: it was "
                    f"converted or resized since {type(self).__name__} was made; make optimizer and schedule later"
                )

    def _check_unchanged(self) -> None:
        """Raise if the optimizer was given other entries than the schedule's."""
        lists = self._lists_of_optimizer()
        if lists.keys() != self._lists.keys() or not all(
            index is self._lists[param] or torch.equal(index, self._lists[param]) for param, index in lists.items()
        ):
            raise RuntimeError(
                f"the optimizer trains other entries than its {type(self).__name__} chose: its mask was changed, or a "
                "state loaded; load the schedule's state too, or close() the schedule"
            )
        self._lists = lists

    def _before(self, optimizer: SparseOptimizer, args: Any, kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{type(self).__name__} counts steps of all parameters together, and this one is taken in backward; "
                "leave step_in_backward"
            )
        # of a step that an error ended
        self._take_flag_back()
        self._check_model()
        self._check_unchanged()
        closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._judge()
            return None

        def judged() -> Any:
            loss = closure()
            self._judge()
            return loss

        return args[:1], {"closure": judged}

    @torch.no_grad()
    def _judge(self) -> None:
        """Find out whether the step counts, and have the optimizer leave it out if it must not be taken."""
        norm = gradient_norm((found.grads, found.indices, found.k) for found in self.optimizer.trained())
        self._found_inf = getattr(self.optimizer, "found_inf", None)
        if norm is None:
            self._step_is_good = None
            return
        left_out = self._found_inf is not None and bool(self._found_inf)
        self._step_is_good = bool(norm.isfinite()) and not left_out
        if not self._step_is_good:
            self._flag = self.optimizer.found_inf = torch.ones_like(norm)  # type: ignore[attr-defined]
            return
        self._before_step()

    def _take_flag_back(self) -> None:
        """Have the optimizer's flag as it was before `_judge` set it, unless somebody else set it since."""
        if self._flag is not None and getattr(self.optimizer, "found_inf", None) is self._flag:
            if self._found_inf is None:
                del self.optimizer.found_inf  # type: ignore[attr-defined]
            else:
                self.optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]
        self._flag = None

    def _after(self, optimizer: SparseOptimizer, args: Any, kwargs: Any) -> None:
        if self._step_is_good is None:
            return
        if self._step_is_good:
            self.steps += 1
            try:
                self._after_step()
            except Exception:
                self.steps -= 1
                raise
            return
        self.skipped += 1
        self._take_flag_back()
