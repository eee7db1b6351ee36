"""fisher_linear_ of many layers in one launch: the tiles of one small layer alone would leave most of a GPU idle."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.kernels import tiles
from sparseft.kernels.fisher_linear import SPAN_FEATURES, SPAN_TOKENS, check_layer, squared_inputs
from sparseft.kernels.fisher_tile import add_tile, widen_span

Layer = tuple[Tensor, Tensor, Tensor]

# int64 numbers a layer in the table; which is which: _row
_COLUMNS = tl.constexpr(16)
_FIRST_TILE, _FIRST_SPAN = tl.constexpr(0), tl.constexpr(1)
_MOST_INT64 = tl.constexpr(2**63 - 1)


@triton.jit
def _find_layer(table, n_layers, FIRST: tl.constexpr, LAYERS: tl.constexpr):
    """Return the row of the layer that this program works on, and its number among the layer's programs."""
    program = tl.program_id(0).to(tl.int64)
    layer = tl.arange(0, LAYERS)
    firsts = tl.load(table + layer * _COLUMNS + FIRST, mask=layer < n_layers, other=_MOST_INT64)
    row = table + (tl.sum((firsts <= program).to(tl.int32)) - 1) * _COLUMNS
    return row, (program - tl.load(row + FIRST)).to(tl.int32)


@triton.jit
def _load(address, ALIGNED: tl.constexpr):
    number = tl.load(address)
    return tl.multiple_of(number, 16) if ALIGNED else number


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(address).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit(do_not_specialize=["n_layers"])
def _fisher_linears_kernel(
    table,
    spans,
    n_layers,
    LAYERS: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_O: tl.constexpr,
    SQUARED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program owns one tile of one layer. ALIGNED: 16 divides what describes a layer in memory."""
    row, tile = _find_layer(table, n_layers, _FIRST_TILE, LAYERS)
    sizes = (
        tl.load(row + 3).to(tl.int32),
        tl.load(row + 4).to(tl.int32),
        _load(row + 5, ALIGNED).to(tl.int32),
        _load(row + 6, ALIGNED).to(tl.int32),
    )
    strides = (
        _load(row + 10, ALIGNED),
        _load(row + 11, ALIGNED),
        _load(row + 12, ALIGNED),
        _load(row + 13, ALIGNED),
    )
    add_tile(
        _pointer(row + 7, tl.float32, ALIGNED),
        _pointer(row + 8, DTYPE, ALIGNED),
        _pointer(row + 9, DTYPE, ALIGNED),
        None,
        None,
        spans + tl.load(row + 2) * 2,
        None,
        None,
        None,
        tile,
        sizes,
        (_load(row + 14, ALIGNED), 1 if ALIGNED else tl.load(row + 15)),
        strides,
        BLOCK_O,
        BLOCK_I,
        BLOCK_T,
        GROUP_O,
        SQUARED,
        UPCAST,
    )


@triton.jit(do_not_specialize=["n_layers"])
def _fisher_linears_spans_kernel(
    table,
    spans,
    n_layers,
    LAYERS: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One program reads TOKENS tokens of one sample of one layer."""
    row, program = _find_layer(table, n_layers, _FIRST_SPAN, LAYERS)
    n_tokens, out_features = tl.load(row + 4).to(tl.int32), _load(row + 5, ALIGNED).to(tl.int32)
    blocks = tl.cdiv(n_tokens, TOKENS)
    n, block = (program // blocks).to(tl.int64), program % blocks
    dy = _pointer(row + 9, DTYPE, ALIGNED) + n * _load(row + 12, ALIGNED)
    span = spans + (tl.load(row + 2) + n) * 2
    widen_span(span, dy, block * TOKENS, n_tokens, out_features, _load(row + 13, ALIGNED), TOKENS, FEATURES)


def fisher_linears_(fishers: list[Tensor], xs: list[Tensor], dys: list[Tensor]) -> None:
    """Do what `fisher_linear_(fisher, x, dy)` does, for every layer of three lists, in one launch a kind of layers.

    Layers may differ in sizes and dtypes; no two of fishers may share memory. Of one kind are those of one dtype, all
    aligned to 16 elements or none, and all of one token or none.
    """
    _check(fishers, xs, dys)
    kinds: dict[tuple[object, ...], list[Layer]] = {}
    for fisher, x, dy in zip(fishers, xs, dys, strict=True):
        if not (fisher.numel() and x.shape[0] and x.shape[1]):
            continue
        squared = x.shape[1] == 1
        if squared:
            x, dy = squared_inputs(x, dy)
        x, dy = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, dy))
        aligned = _aligned(fisher, x, dy)
        # of so few tokens, layers take smaller blocks where blocks are large
        few_tokens = aligned and x.dtype.itemsize == 2 and x.shape[1] <= 32
        kind = (fisher.device, x.dtype, aligned, few_tokens, squared)
        kinds.setdefault(kind, []).append((fisher, x, dy))
    for (*_, squared), layers in kinds.items():
        _launch(layers, bool(squared))


def _launch(layers: list[Layer], squared: bool) -> None:
    fisher, x, dy = layers[0]
    tile = tiles.choose([(x, dy) for _, x, dy in layers])
    table, tile_programs, span_programs = _make_table(layers, tile)
    spans = torch.zeros(sum(x.shape[0] for _, x, _ in layers), 2, dtype=torch.int32, device=x.device)
    kind = {
        "LAYERS": max(16, triton.next_power_of_2(len(layers))),
        "DTYPE": getattr(tl, str(x.dtype).removeprefix("torch.")),
        "ALIGNED": _aligned(fisher, x, dy),
    }
    with torch.cuda.device_of(fisher):
        _fisher_linears_spans_kernel[(span_programs,)](
            table,
            spans,
            len(layers),
            **kind,
            TOKENS=SPAN_TOKENS,
            FEATURES=SPAN_FEATURES,
            num_warps=4,
            enable_fp_fusion=True,
        )
        _fisher_linears_kernel[(tile_programs,)](
            table, spans, len(layers), **kind, **tiles.constants(x, tile, squared)
        )


def _make_table(layers: list[Layer], tile: tiles.Tile) -> tuple[Tensor, int, int]:
    """Return the table, int64 [layers, _COLUMNS] on the device, and how many programs either kernel takes."""
    rows, first_tile, first_span, first_sample = [], 0, 0, 0
    for fisher, x, dy in layers:
        n_samples, n_tokens, in_features = x.shape
        sizes = (n_samples, n_tokens, dy.shape[2], in_features)
        addresses = (fisher.data_ptr(), x.data_ptr(), dy.data_ptr())
        strides = (*x.stride()[:2], *dy.stride()[:2], *fisher.stride())
        rows.append((first_tile, first_span, first_sample, *sizes, *addresses, *strides))
        first_tile += tile.programs(*fisher.shape)
        first_span += n_samples * triton.cdiv(n_tokens, SPAN_TOKENS)
        first_sample += n_samples
    table = torch.tensor(rows, dtype=torch.int64)
    device = layers[0][0].device
    if device.type == "cuda":
        # from pinned memory the copy does not wait for the GPU
        table = table.pin_memory().to(device, non_blocking=True)
    return table, first_tile, first_span


def _aligned(fisher: Tensor, x: Tensor, dy: Tensor) -> bool:
    rows = fisher.stride(1) == 1 and fisher.stride(0) % 16 == 0 and fisher.data_ptr() % 16 == 0
    return rows and tiles.aligned(x, dy)


def _check(fishers: list[Tensor], xs: list[Tensor], dys: list[Tensor]) -> None:
    if not len(fishers) == len(xs) == len(dys):
        raise ValueError(
            f"fishers, xs and dys must hold one tensor a layer, got {len(fishers)}, {len(xs)} and {len(dys)}"
        )
    for layer in zip(fishers, xs, dys, strict=True):
        check_layer(*layer)
    addresses = sorted(fisher.data_ptr() for fisher in fishers if fisher.numel())
    if any(a == b for a, b in itertools.pairwise(addresses)):
        raise ValueError(
            "fishers must not share memory, got the same twice: tiles are added to at once; call once for each use"
        )
    if any(fisher.is_cuda for fisher in fishers) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "fisher_linears_ cannot be captured in a CUDA graph, got a capturing stream: replays would read a table "
            "of addresses that is gone; call it outside of the graph"
        )
