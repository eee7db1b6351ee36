"""One launch for a whole list of tensors: its programs find their tensor through a table of addresses in memory.

The table is one int64 tensor. It begins with two numbers a program: where in the table its tensor is described, and
the first of the elements it works on. Then comes one row a tensor: how many elements there are to work on, and
whatever else the kernel wants to know, mostly addresses. Work is cut by elements, not by tensors, because the numbers
of selected entries differ a thousandfold between tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.index_lists import BLOCK, PACKED
from sparseft.kernels.index_lists import load_positions

# elements a program: 4 a thread, few enough for every thread of a multiprocessor to be busy with random reads
CHUNK = 1024
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
POSITIONS = (torch.int32, torch.int64)
INDICES = (*POSITIONS, PACKED)
# by bytes an entry: kernels that only move entries move words, which keeps every bit of every dtype
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TRITON_DTYPES = {dtype: getattr(tl, str(dtype).removeprefix("torch.")) for dtype in (*FLOATS, *WORDS.values())}

Row = tuple[int, ...]


@triton.jit
def find_chunk(table, CHUNK: tl.constexpr):
    """Return this program's row of the table, the elements it works on, and which of them exist."""
    entry = table + tl.program_id(0).to(tl.int64) * 2
    row = table + tl.load(entry)
    element = tl.load(entry + 1) + tl.arange(0, CHUNK)
    return row, element, element < tl.load(row)


@triton.jit
def pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    """Return what a column of the row points to, as elements of a dtype."""
    return tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))


@triton.jit
def load_index(row, element, exists, INDEX: tl.constexpr):
    """Return the positions of selected entries; columns 1 and 2 of the row are `index_columns`."""
    indices = pointer(row, 1, INDEX)
    if INDEX == tl.int16:
        return load_positions(indices, tl.load(row + 2), element, exists)
    else:
        return tl.load(indices + element, mask=exists, other=0)


def index_columns(indices: Tensor, numel: int) -> Row:
    """Return the address of an index list into a tensor of `numel` elements, and its blocks, if it is packed."""
    return indices.data_ptr(), triton.cdiv(numel, BLOCK)


def launch(
    kernel: Any,
    groups: Mapping[tuple[Any, ...], list[Row]],
    constants: tuple[str, ...],
    device: torch.device,
    *arguments: Any,
    **more_constants: Any,
) -> None:
    """Launch `kernel(table, *arguments, ...)` once for every group of tensors that differ in addresses and sizes only.

    groups: rows of the table by the values of `constants`, the compile-time constants that differ between groups.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for values, rows in groups.items():
            table, programs = cached_table(tuple(rows), CHUNK, device)
            varying = {name: _TRITON_DTYPES.get(value, value) for name, value in zip(constants, values, strict=True)}
            kernel[(programs,)](
                table, *arguments, **varying, **more_constants, CHUNK=CHUNK, num_warps=8, enable_fp_fusion=True
            )


def cached_table(rows: tuple[Row, ...], chunk: int, device: torch.device) -> tuple[Tensor, int]:
    """Return what `make_table` returns, from a cache: most tensors stay where they are from step to step.

    Safe because the table depends on nothing but the key: other tensors that come to lie at the same addresses, with
    the same sizes, need the same table. The stream is in the key so that no stream reads a table that another is still
    receiving, or that was freed on another.
    """
    if device.type != "cuda":
        return _cached_table(rows, chunk, device, 0)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Triton kernels over lists of tensors cannot be captured in a CUDA graph, got a capturing stream: replays "
            "would read a table of addresses that is gone; call them outside of the graph"
        )
    return _cached_table(rows, chunk, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=16)
def _cached_table(rows: tuple[Row, ...], chunk: int, device: torch.device, stream: int) -> tuple[Tensor, int]:
    return make_table(rows, chunk, device)


def make_table(rows: tuple[Row, ...], chunk: int, device: torch.device) -> tuple[Tensor, int]:
    """Return the table, int64 on `device`, and the number of programs it is for.

    rows: one a tensor, all of one length, each beginning with the number of elements; chunk: elements a program.
    """
    described = torch.tensor(rows, dtype=torch.int64)
    chunks = (described[:, 0] + chunk - 1) // chunk
    owner = torch.repeat_interleave(torch.arange(len(rows)), chunks)
    programs = owner.numel()
    start = (torch.arange(programs) - (chunks.cumsum(0) - chunks)[owner]) * chunk
    offset = 2 * programs + owner * described.shape[1]
    table = torch.cat([torch.stack([offset, start], dim=1).view(-1), described.view(-1)])
    if device.type == "cuda":
        # from pinned memory the copy does not wait for the GPU
        table = table.pin_memory().to(device, non_blocking=True)
    return table, programs
