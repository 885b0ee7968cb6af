"""Every Triton kernel compiled for Ampere and Hopper, without a GPU: wide accesses, and no registers spilled."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from layers.kernels import bn_act_triton, crf_triton, highway_triton, linear_act_triton  # noqa: E402

FLOAT32 = ("partial", "statistics", "mean", "inverse_std", "weight", "bias", "mean_dz", "mean_dz_xhat")
SIZES = ("num_rows", "num_channels", "num_columns", "depth", "batch_stride", "row_stride", "channel_stride", "size")


def compiled(kernel: Any, constants: dict[str, Any], data: str, capability: int, **options: int) -> Any:
    """Pointers and sizes are taken to be multiples of 16, as they are for common numbers of channels."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            norm = kernel is not linear_act_triton.linear_kernel
            signature[name] = "*fp32" if norm and name.removesuffix("_ptr") in FLOAT32 else "*" + data
        else:
            signature[name] = "fp32" if name in ("count", "eps") else "i32"
        if name == "kinds_ptr":
            signature[name] = "*i8"
        if name.endswith("_ptr") or name in SIZES:
            attributes[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    attributes = {key: value for key, value in attributes.items() if key not in values}
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True, **options}
    )


def local_bytes(cubin: bytes, folder: Path) -> int:
    """Stack and local memory of a thread, where spilled registers go."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(STACK|LOCAL):(\d+)", text))
    assert usage, text
    return sum(int(value) for value in usage.values())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("data", ["bf16", "fp32"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.skipif(sys.platform != "linux", reason="ptxas comes with Triton on Linux")
def test_batch_norm(capability: int, data: str, channels_last: bool, tmp_path: Path) -> None:
    tilings = bn_act_triton.CHANNELS_LAST if channels_last else bn_act_triton.CONTIGUOUS
    kernels = (
        bn_act_triton.moments_kernel,
        bn_act_triton.forward_kernel,
        bn_act_triton.sums_kernel,
        bn_act_triton.backward_kernel,
    )
    # The first tiling is what runs untuned; the kernel with most registers is compiled with all of them.
    for kernel, tiling in [*((k, tilings[0]) for k in kernels), *((kernels[-1], t) for t in tilings[1:])]:
        constants: dict[str, Any] = {
            "ROWS": tiling.rows,
            "CHANNELS": tiling.channels,
            "TILES": tiling.tiles,
            "ACTIVATION": "relu",
        }
        constants["channel_stride" if channels_last else "row_stride"] = 1
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        result = compiled(kernel, constants, data, capability, num_warps=tiling.num_warps)
        accesses = re.findall(r"(ld|st)\.global(\S*)\.v4\.b32", result.asm["ptx"])
        writes = kernel in (bn_act_triton.forward_kernel, bn_act_triton.backward_kernel)
        assert {kind for kind, _ in accesses} >= ({"ld", "st"} if writes else {"ld"}), (kernel, tiling)
        assert local_bytes(result.asm["cubin"], tmp_path) == 0, (kernel, tiling)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("data", ["bf16", "fp32"])
@pytest.mark.skipif(sys.platform != "linux", reason="ptxas comes with Triton on Linux")
def test_linear(capability: int, data: str, tmp_path: Path) -> None:
    for configuration in linear_act_triton.CONFIGURATIONS:
        rows, columns, depth, num_warps, num_stages = configuration
        constants = {"ACTIVATION": "relu", "PRECISION": "tf32", "ROWS": rows, "COLUMNS": columns, "DEPTH": depth}
        result = compiled(
            linear_act_triton.linear_kernel, constants, data, capability, num_warps=num_warps, num_stages=num_stages
        )
        ptx = result.asm["ptx"]
        warpgroup = capability == 90 and rows >= 64  # the least that its instruction takes
        assert re.search(r"wgmma" if warpgroup else r"mma\.sync", ptx), configuration
        assert re.search(r"cp\.async\S* .*(16|0x10)", ptx) or ".v4" in ptx, configuration  # 16 bytes at a time
        assert local_bytes(result.asm["cubin"], tmp_path) == 0, configuration


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.skipif(sys.platform != "linux", reason="ptxas comes with Triton on Linux")
def test_finish(capability: int, tmp_path: Path) -> None:
    constants = {"ROWS_PER_PROGRAM": 256, "PROGRAMS": 32, "CHANNELS": 32}
    result = compiled(bn_act_triton.finish_kernel, constants, "fp32", capability)
    assert local_bytes(result.asm["cubin"], tmp_path) == 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.skipif(sys.platform != "linux", reason="ptxas comes with Triton on Linux")
def test_crf(capability: int, tmp_path: Path) -> None:
    for kernel in (crf_triton.forward_kernel, crf_triton.backward_kernel):
        for num_tags in (9, 64):  # the fewest and the most registers
            constants = crf_triton.tile(num_tags)
            num_warps = constants.pop("num_warps")
            result = compiled(kernel, constants, "fp32", capability, num_warps=num_warps)
            on_the_stack = 16 if num_tags == 64 else 0  # four registers, by Triton 3.6
            assert local_bytes(result.asm["cubin"], tmp_path) <= on_the_stack, (kernel, num_tags)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("data", ["bf16", "fp32"])
@pytest.mark.skipif(sys.platform != "linux", reason="ptxas comes with Triton on Linux")
def test_highway(capability: int, data: str, tmp_path: Path) -> None:
    for kernel in (highway_triton.forward_kernel, highway_triton.backward_kernel):
        constants = {"ACTIVATION": "relu", "BLOCK": highway_triton.BLOCK}
        result = compiled(kernel, constants, data, capability)
        accesses = {kind for kind, _ in re.findall(r"(ld|st)\.global(\S*)\.v4\.b32", result.asm["ptx"])}
        assert accesses == {"ld", "st"}, kernel
        assert local_bytes(result.asm["cubin"], tmp_path) == 0, kernel
