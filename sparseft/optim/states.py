"""What an optimizer keeps beside the selected entries of a parameter.

Running means ("moments") are one fp32 value an entry, or 8 bits with a scale for every 256.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseft.low_bits import code_blocks, decode, encode
from sparseft.optim.mask_change import Move
from sparseft.optim.parameters import entries, values


def make_state(
    state: dict[str, Any], group: Mapping[str, Any], names: Sequence[str], param: Tensor, index: Tensor
) -> None:
    """Complete a parameter's state with what the options of its group need.

    names: of the moments, at most two; the second one is a mean of squares.
    """
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    if group["rounding"] == "master" and param.dtype != torch.float32 and "master" not in state:
        state["master"] = values(param, index).float()
    if group["decay_to"] == "pretrained" and "pretrained" not in state:
        state["pretrained"] = values(param, index)
    if names and names[0] not in state:
        state |= _new_moments(names, entries(param, index), param.device, group["state_bits"])
    elif names and (group["state_bits"] == 8) != ("scales" in state):
        moments = _in_fp32(state, names)
        state.pop("scales", None)
        state |= _in_8_bits(moments) if group["state_bits"] == 8 else moments


def carried_state(
    state: dict[str, Any], names: Sequence[str], param: Tensor, index: Tensor, move: Move
) -> dict[str, Any]:
    """Return the state of other entries of a parameter: what stays, and a beginning for what is new."""
    if move.nowhere:
        return state
    carried = {"step": state["step"]}
    for name in state.keys() & {"master", "pretrained"}:
        carried[name] = move.carry(state[name], values(param, index).to(state[name].dtype))
    moments = _in_fp32(state, [name for name in names if name in state])
    moments = {name: move.carry(moment, moment.new_zeros(entries(param, index))) for name, moment in moments.items()}
    return carried | (_in_8_bits(moments) if "scales" in state else moments)


def fill_state(state: dict[str, Any], other: Mapping[str, Any], names: Sequence[str], slots: Tensor) -> None:
    """Take another state's values into some slots of a state; step counts stay.

    slots: int64, where in the state the entries of the other are.
    """
    for name in state.keys() & other.keys() & {"master", "pretrained"}:
        state[name][slots] = other[name]
    names = [name for name in names if name in state and name in other]
    moments, others = _in_fp32(state, names), _in_fp32(other, names)
    for name in names:
        moments[name][slots] = others[name]
    if "scales" in state:
        state |= _in_8_bits(moments)


def _new_moments(names: Sequence[str], k: int, device: torch.device, bits: int) -> dict[str, Tensor]:
    dtype = torch.uint8 if bits == 8 else torch.float32
    moments = {name: torch.zeros(k, dtype=dtype, device=device) for name in names}
    if bits == 8:
        moments["scales"] = torch.zeros(len(names), code_blocks(k), dtype=torch.float32, device=device)
    return moments


def _in_fp32(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the moments of a parameter's state, fp32 [k]."""
    if "scales" not in state:
        return {name: state[name] for name in names}
    return {name: decode(state[name], state["scales"][i], i == 1) for i, name in enumerate(names)}


def _in_8_bits(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return codes of fp32 moments, a mean and maybe one of squares, and `scales`, [number of moments, blocks]."""
    pairs = {name: encode(values, i == 1) for i, (name, values) in enumerate(moments.items())}
    codes = {name: codes for name, (codes, _) in pairs.items()}
    return {**codes, "scales": torch.stack([scales for _, scales in pairs.values()])}
