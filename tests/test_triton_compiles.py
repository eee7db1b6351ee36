"""Every kernel, as its launcher launches it, compiles for Ampere and Hopper into what it was designed to be.

Needs no GPU. The launchers run for real, on CPU tensors, with every kernel replaced by a recorder; what they would
have launched is compiled ahead of time, in a process of its own, because here kernels may be interpreter objects.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from sparseft import index_lists, ops, testing

ARCHITECTURES = (80, 90)
HELPERS = ["_histogram_kernel", "_count_kernel", "_fisher_linear_spans_kernel", "_fisher_linears_spans_kernel"]
OPS = [op for op in ops.SCHEMAS if op not in ops.CPU_ONLY]
KERNELS = [f"_{op.rstrip('_')}_kernel" for op in OPS] + HELPERS
FISHER_KERNELS = ["_fisher_linear_kernel", "_fisher_linears_kernel", "_fisher_segments_kernel"]
PRODUCT_KERNELS = [*FISHER_KERNELS, "_selected_grad_kernel"]
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPES |= {torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


class Recorder:
    """Stands in for a kernel; notes its launches, each as the compiler would be asked for it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.record

    def record(
        self,
        *args: Any,
        num_warps: int = 4,
        num_stages: int = 3,
        maxnreg: int | None = None,
        enable_fp_fusion: bool,
        **kwargs: Any,
    ) -> None:
        values = dict(zip(self.kernel.arg_names, args), **kwargs)  # noqa: B905
        assert values.keys() == set(self.kernel.arg_names)
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
        options |= {} if maxnreg is None else {"maxnreg": maxnreg}
        types = {param.name: specialize(values[param.name], param) for param in self.kernel.params}
        self.launches[str((types, options))] = (types, options)


def specialize(value: Any, param: Any) -> tuple[str, Any]:
    """Return what Triton makes of an argument: its type, and its value or whether 16 divides it."""
    if param.is_constexpr or value is None:
        return "constexpr", value
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>", False
    if isinstance(value, float):
        return "fp32", False
    if param.do_not_specialize:
        return "i32", False
    return ("constexpr", 1) if value == 1 else ("i32", value % 16 == 0)


def launch_everything(architecture: int) -> None:
    tiles = importlib.import_module("sparseft.kernels.tiles")
    hopper = architecture >= 90
    tiles.gpu = lambda device: (hopper, 132)
    for op in OPS:
        launcher = getattr(importlib.import_module("sparseft.kernels"), op)
        for dtype in testing.DTYPES:
            samples = testing.sample_inputs(op, "cpu", dtype)
            # fp16 differs from bf16 in one instruction: one sample of it saves a third of the time
            for sample in itertools.islice(samples, 1 if dtype == torch.float16 else None):
                launcher(*sample.args, **sample.kwargs)
    # sample inputs are too small for large tiles
    for dtype in (torch.float32, torch.bfloat16):
        for block_t in (16, 32, 64) if hopper else (16, 32):
            launch_tiles(tiles, dtype, block_t)


def launch_tiles(tiles: Any, dtype: torch.dtype, block_t: int) -> None:
    """Launch what can be launched with blocks of `block_t` tokens, in all tiles."""
    fisher_linear, fisher_linears, fisher_segments = (
        importlib.import_module(f"sparseft.kernels.fisher_{name}") for name in ("linear", "linears", "segments")
    )
    fisher, x, weight = torch.zeros(256, 256), torch.zeros(2, 64, 256, dtype=dtype), torch.ones(2)
    rows, offsets, groups = x.flatten(0, 1), torch.tensor([0, 5, 128]), torch.tensor([1, 0])
    choose = tiles.choose
    for tile in tiles.available(dtype, True, block_t):
        fisher_segments.launch(torch.zeros(2, 256, 256), rows, rows, offsets, groups, weight, tile)
        if block_t > 16:
            fisher_linear.launch(fisher, x, x, None, tile)
            fisher_linear.launch(fisher, x, x, weight, tile)
            fisher_linear.launch(fisher, x, x, weight, tile, scores=weight)
            tiles.choose = lambda layers, tile=tile: tile
            fisher_linears.fisher_linears_([fisher], [x], [x])
    tiles.choose = choose
    selected_grad = importlib.import_module("sparseft.kernels.selected_grad")
    indices, tile = index_lists.pack(torch.arange(0, 65536, 300), 65536), selected_grad.choose_tile(rows, rows)
    for dy in (rows, rows[:1].expand(128, 256)):  # by descriptors where there are any, by pointers
        for splits in (1, 2):
            selected_grad.launch(torch.zeros(219), rows, dy, indices, tile, splits)
    for tile in tiles.available(dtype, True, block_t, selected=True) if block_t > 16 else ():
        fisher_linear.launch(fisher, x, x, weight, tile, scores=weight, selected=fisher == 0)


def compile_launch(kernel: Any, types: dict[str, tuple[str, Any]], options: dict[str, Any], architecture: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: (i,) for i, name in enumerate(types)}
    source = ASTSource(
        fn=kernel,
        signature={name: type_ for name, (type_, _) in types.items()},
        constexprs={position[name]: value for name, (type_, value) in types.items() if type_ == "constexpr"},
        attrs={
            position[name]: [["tt.divisibility", 16]]
            for name, (type_, divisible) in types.items()
            if type_ != "constexpr" and divisible
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def facts(compiled: Any) -> dict[str, Any]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {name: int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL")}
    ttgir, ptx = compiled.asm["ttgir"], compiled.asm["ptx"]
    return {
        **counts,
        "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma.sync": ptx.count("mma.sync"),
        "loops": ttgir.count("scf.for"),
        "loads in flight": max(map(int, re.findall(r"async_wait.*?num = (\d+)", ttgir)), default=0),
        "descriptor loads": ptx.count("cp.async.bulk.tensor"),
    }


def compile_everything() -> Iterator[dict[str, Any]]:
    import triton

    recorders: dict[str, Recorder] = {}
    package = importlib.import_module("sparseft.kernels")
    for info in pkgutil.iter_modules(package.__path__, "sparseft.kernels."):
        module = importlib.import_module(info.name)
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                recorders[name] = Recorder(value)
                setattr(module, name, recorders[name])
    for architecture in ARCHITECTURES:
        launch_everything(architecture)
        for name, recorder in recorders.items():
            for types, options in recorder.launches.values():
                compiled = compile_launch(recorder.kernel, types, options, architecture)
                variant = {key: f"{type_} {value}" for key, (type_, value) in types.items()} | options
                yield {"kernel": name, "architecture": architecture, "variant": variant, **facts(compiled)}
            recorder.launches.clear()


@functools.cache
def compiled_variants() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def variants_of(kernel: str, architecture: int) -> list[dict[str, Any]]:
    found = [v for v in compiled_variants() if v["kernel"] == kernel and v["architecture"] == architecture]
    assert found, f"{kernel} was never launched"
    return found


def test_every_kernel_of_the_package_is_launched():
    assert {variant["kernel"] for variant in compiled_variants()} == set(KERNELS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_stays_in_registers_and_shared_memory(kernel, architecture):
    for variant in variants_of(kernel, architecture):
        assert variant["STACK"] == variant["LOCAL"] == 0, variant
        assert variant["REG"] <= 248, variant
        assert variant["shared"] <= SHARED_MEMORY[architecture], variant


def input_dtype(variant: dict[str, Any]) -> str:
    described = variant["variant"]
    return described["DTYPE"].split()[1] if "DTYPE" in described else described["x"].split()[0].lstrip("*")


def aligned(variant: dict[str, Any]) -> bool:
    described = variant["variant"]
    names = ["ALIGNED"] if "ALIGNED" in described else ["out_features", "in_features"]
    return all(described[name].endswith("True") for name in names)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", PRODUCT_KERNELS)
def test_product_of_16_bit_inputs_runs_on_tensor_cores(kernel, architecture):
    wanted, other = ("wgmma", "mma.sync") if architecture >= 90 else ("mma.sync", "wgmma")
    variants = [v for v in variants_of(kernel, architecture) if input_dtype(v) != "fp32"]
    assert {input_dtype(variant) for variant in variants} == {"bf16", "fp16"}
    for variant in variants:
        assert variant[wanted] > 0, variant
        assert variant[other] == 0, variant


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", PRODUCT_KERNELS)
def test_product_of_fp32_inputs_is_never_rounded_to_tf32(kernel, architecture):
    variants = [v for v in variants_of(kernel, architecture) if input_dtype(v) == "fp32"]
    assert variants
    for variant in variants:
        assert variant["wgmma"] == variant["mma.sync"] == 0, variant


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", FISHER_KERNELS)
def test_fisher_keeps_loads_in_flight_from_sample_to_sample(kernel, architecture):
    """No loop a sample: one over all blocks, for pointers and for descriptors; linear ones count the blocks first."""
    variants = variants_of(kernel, architecture)
    assert any(map(aligned, variants))
    for variant in variants:
        by_descriptor = variant["variant"].get("x_descriptor", "").startswith("tensordesc")
        assert variant["loops"] == (1 if kernel == "_fisher_segments_kernel" else 2 + by_descriptor), variant
        assert not aligned(variant) or variant["loads in flight"] > 0, variant
        # one of x and one of dy where the loop begins, for each stage but the last, and in the loop
        assert variant["descriptor loads"] == (2 * variant["variant"]["num_stages"] if by_descriptor else 0), variant


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_selected_grad_keeps_loads_in_flight(architecture):
    sizes = ("out_features", "in_features", "x_stride", "dy_stride")
    variants = variants_of("_selected_grad_kernel", architecture)
    by_descriptor = [v for v in variants if v["variant"]["x_descriptor"].startswith("tensordesc")]
    by_pointer = [v for v in variants if v not in by_descriptor and all("True" in v["variant"][s] for s in sizes)]
    assert by_pointer
    assert all(variant["loads in flight"] > 0 for variant in by_pointer), by_pointer
    assert bool(by_descriptor) == (architecture >= 90)
    for variant in by_descriptor:
        assert variant["descriptor loads"] == 2 * variant["variant"]["num_stages"], variant


def test_hopper_loads_aligned_inputs_of_16_bits_by_descriptor():
    variants = [v for v in variants_of("_fisher_linear_kernel", 90) if input_dtype(v) == "bf16"]
    by_descriptor = [v["variant"]["x_descriptor"].startswith("tensordesc") for v in variants]
    assert any(by_descriptor)
    assert by_descriptor == [aligned(v) and v["variant"]["selected"] == "constexpr None" for v in variants]


if __name__ == "__main__":
    for row in compile_everything():
        print(json.dumps(row))
