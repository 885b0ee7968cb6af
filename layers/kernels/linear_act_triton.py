"""`linear_act` in Triton: a blocked matrix product whose epilogue adds bias and residual and activates."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from layers.kernels.bn_act_triton_kernels import _activate

# Tiles by least size of the result, (ROWS, COLUMNS, DEPTH, num_warps, num_stages), timed once for each problem on the
# device. Hopper's tensor cores want 128 rows for two warpgroups (8 warps) and run ahead 3 to 4 stages of 64; Ampere has
# 164 KB of shared memory a multiprocessor against 228 KB, which 3 stages of 32 or 64 of the smaller tiles fit. Small
# results need small tiles, or most multiprocessors idle.
CONFIGURATIONS: tuple[tuple[int, ...], ...] = (
    (64, 64, 32, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 128, 32, 4, 4),
    (32, 32, 64, 4, 4),
)


@triton.jit
def linear_kernel(
    x_ptr,  # (num_rows, depth)
    weight_ptr,  # (num_columns, depth)
    bias_ptr,  # (num_columns,) or None
    residual_ptr,  # (num_rows, num_columns) or None
    y_ptr,  # (num_rows, num_columns)
    num_rows,
    num_columns,
    depth,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of the result; neighbours in program order share columns of weight, which stay in L2."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows = rows < num_rows
    in_columns = columns < num_columns
    steps = tl.arange(0, DEPTH)
    x_tile = x_ptr + rows[:, None] * depth + steps[None, :]
    weight_tile = weight_ptr + columns[None, :] * depth + steps[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, depth, DEPTH):
        in_depth = first + steps < depth
        x = tl.load(x_tile, in_rows[:, None] & in_depth[None, :], other=0.0)
        weight = tl.load(weight_tile, in_columns[None, :] & in_depth[:, None], other=0.0)
        total = tl.dot(x, weight, total, input_precision=PRECISION)
        x_tile += DEPTH
        weight_tile += DEPTH
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, in_columns, other=0.0).to(tl.float32)[None, :]
    offsets = rows[:, None] * num_columns + columns[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + offsets, mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, _activate(total, ACTIVATION), mask)


_fastest: dict[Any, tuple[int, ...]] = {}


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """As `layers.kernels.linear_act.reference`, for x (rows, in)."""
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    rows, depth = x.shape
    columns = weight.shape[0]
    y = x.new_empty(rows, columns)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"

    def run(configuration: tuple[int, ...]) -> None:
        tile_rows, tile_columns, tile_depth, num_warps, num_stages = configuration
        linear_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns))](
            x,
            weight,
            bias,
            residual,
            y,
            rows,
            columns,
            depth,
            ACTIVATION=activation,
            PRECISION=precision,
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            DEPTH=tile_depth,
            num_warps=num_warps,
            num_stages=num_stages,
        )

    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        run(CONFIGURATIONS[0])
        return y
    key = (x.device, x.dtype, rows.bit_length(), columns, depth, precision)
    if key not in _fastest:
        times = {c: float(triton.testing.do_bench(lambda c=c: run(c), warmup=2, rep=10)) for c in CONFIGURATIONS}
        _fastest[key] = min(times, key=times.__getitem__)
    run(_fastest[key])
    return y
