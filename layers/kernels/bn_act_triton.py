"""`bn_act` in Triton: bounded by memory, so what counts is how often x crosses it and that accesses are wide.

Forward: x is read twice (statistics; normalise, add, activate) and y written once. Backward: dy and x (and y where
there was a residual) are read twice and dx written once. All three kernels see x as (batches, rows, channels) with two
strides: channels-last is one batch of rows, contiguous is rows of stride 1. Each program takes a tile of TILES * ROWS
rows and CHANNELS channels of one batch, so that 16-byte accesses run along whichever axis has stride 1.

Statistics: every program reduces its tiles to mean and sum of squared deviations in float32, and `_finish` merges them
(Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample variances, 1979), which loses no
digits where the mean is large.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from layers.kernels.bn_act import all_reduced, dense_format, statistics_dtype, statistics_of_sums, synchronised_means


@triton.jit
def _locate(num_rows, num_channels, batch_stride, row_stride, channel_stride, ROWS, CHANNELS, TILES):
    """First row of this program, offset of its first element, and the channels with their mask."""
    first_row = tl.program_id(0) * (ROWS * TILES)
    first_channel = tl.program_id(1) * CHANNELS
    base = tl.program_id(2).to(tl.int64) * batch_stride
    base += first_row.to(tl.int64) * row_stride + first_channel.to(tl.int64) * channel_stride
    channels = first_channel + tl.arange(0, CHANNELS)
    return first_row, base, channels, channels < num_channels


@triton.jit
def _derivative(dy, z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(z > 0, dy, 0.0)
    elif ACTIVATION == "relu6":
        return tl.where((z > 0) & (z < 6), dy, 0.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        return dy * s * (1 + z * (1 - s))
    else:
        return dy


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.maximum(z, 0.0)
    elif ACTIVATION == "relu6":
        return tl.minimum(tl.maximum(z, 0.0), 6.0)
    elif ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    else:
        return z


@triton.jit
def _per_channel(pointer, channels, in_channels, default):
    if pointer is None:
        return tl.full(channels.shape, default, tl.float32)
    else:
        return tl.load(pointer + channels, in_channels, other=0.0)


@triton.jit
def moments_kernel(
    x_ptr,  # data
    partial_ptr,  # (programs, 2, channels) float32: mean and sum of squared deviations
    num_rows,
    num_channels,
    batch_stride,
    row_stride,
    channel_stride,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Moments of the rows of each program."""
    first_row, base, channels, in_channels = _locate(
        num_rows, num_channels, batch_stride, row_stride, channel_stride, ROWS, CHANNELS, TILES
    )
    local_rows = tl.arange(0, ROWS)
    offsets = local_rows[:, None] * row_stride + tl.arange(0, CHANNELS)[None, :] * channel_stride
    count = 0.0
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for tile in range(TILES):
        rows = first_row + tile * ROWS + local_rows
        mask = (rows < num_rows)[:, None] & in_channels[None, :]
        x = tl.load(x_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        size = tl.minimum(tl.maximum(num_rows - first_row - tile * ROWS, 0), ROWS).to(tl.float32)
        tile_mean = tl.sum(x, 0) / tl.maximum(size, 1.0)
        deviation = tl.where(mask, x - tile_mean[None, :], 0.0)
        total = tl.maximum(count + size, 1.0)
        delta = tile_mean - mean
        squares += tl.sum(deviation * deviation, 0) + delta * delta * (count * size / total)
        mean += delta * (size / total)
        count += size
        base += ROWS * row_stride
    program = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    out = partial_ptr + program * 2 * num_channels + channels
    tl.store(out, mean, in_channels)
    tl.store(out + num_channels, squares, in_channels)


@triton.jit
def finish_kernel(
    partial_ptr,  # as written by moments_kernel
    statistics_ptr,  # (3, channels) float32: mean, 1 / sqrt(variance + eps), unbiased variance
    num_programs,
    programs_per_batch,
    num_rows,
    num_channels,
    count,  # elements of a channel
    eps,
    ROWS_PER_PROGRAM: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Statistics of all rows from those of each program."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = channels < num_channels
    mean = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, num_programs, PROGRAMS):
        programs = first + tl.arange(0, PROGRAMS)
        mask = (programs < num_programs)[:, None] & in_channels[None, :]
        size = tl.minimum(num_rows - (programs % programs_per_batch) * ROWS_PER_PROGRAM, ROWS_PER_PROGRAM)
        part = tl.load(partial_ptr + programs[:, None] * 2 * num_channels + channels[None, :], mask, other=0.0)
        mean += tl.sum(part * (size / count)[:, None], 0)
    squares = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, num_programs, PROGRAMS):
        programs = first + tl.arange(0, PROGRAMS)
        mask = (programs < num_programs)[:, None] & in_channels[None, :]
        size = tl.minimum(num_rows - (programs % programs_per_batch) * ROWS_PER_PROGRAM, ROWS_PER_PROGRAM)
        pointers = partial_ptr + programs[:, None] * 2 * num_channels + channels[None, :]
        deviation = tl.load(pointers, mask, other=0.0) - mean[None, :]
        within = tl.load(pointers + num_channels, mask, other=0.0)
        squares += tl.sum(tl.where(mask, within + deviation * deviation * size[:, None], 0.0), 0)
    out = statistics_ptr + channels
    tl.store(out, mean, in_channels)
    tl.store(out + num_channels, 1 / tl.sqrt(squares / count + eps), in_channels)
    tl.store(out + 2 * num_channels, squares / tl.maximum(count - 1, 1), in_channels)


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,  # or None
    y_ptr,
    mean_ptr,
    inverse_std_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    num_rows,
    num_channels,
    batch_stride,
    row_stride,
    channel_stride,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """y = activation(x scale + shift + residual)."""
    first_row, base, channels, in_channels = _locate(
        num_rows, num_channels, batch_stride, row_stride, channel_stride, ROWS, CHANNELS, TILES
    )
    scale = _per_channel(inverse_std_ptr, channels, in_channels, 1.0)
    scale *= _per_channel(weight_ptr, channels, in_channels, 1.0)
    shift = _per_channel(bias_ptr, channels, in_channels, 0.0)
    shift -= _per_channel(mean_ptr, channels, in_channels, 0.0) * scale
    local_rows = tl.arange(0, ROWS)
    offsets = local_rows[:, None] * row_stride + tl.arange(0, CHANNELS)[None, :] * channel_stride
    for tile in range(TILES):
        rows = first_row + tile * ROWS + local_rows
        mask = (rows < num_rows)[:, None] & in_channels[None, :]
        z = tl.load(x_ptr + base + offsets, mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
        if residual_ptr is not None:
            z += tl.load(residual_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + base + offsets, _activate(z, ACTIVATION), mask)
        base += ROWS * row_stride


@triton.jit
def sums_kernel(
    dy_ptr,
    x_ptr,
    y_ptr,  # or None, and z is computed again
    partial_ptr,  # (programs, 2, channels) float32: sums of dz and of dz xhat
    mean_ptr,
    inverse_std_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    num_rows,
    num_channels,
    batch_stride,
    row_stride,
    channel_stride,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """What the rows of each program contribute to the gradients of bias and weight."""
    first_row, base, channels, in_channels = _locate(
        num_rows, num_channels, batch_stride, row_stride, channel_stride, ROWS, CHANNELS, TILES
    )
    mean = _per_channel(mean_ptr, channels, in_channels, 0.0)
    inverse_std = _per_channel(inverse_std_ptr, channels, in_channels, 1.0)
    weight = _per_channel(weight_ptr, channels, in_channels, 1.0)
    bias = _per_channel(bias_ptr, channels, in_channels, 0.0)
    local_rows = tl.arange(0, ROWS)
    offsets = local_rows[:, None] * row_stride + tl.arange(0, CHANNELS)[None, :] * channel_stride
    sum_dz = tl.zeros([CHANNELS], tl.float32)
    sum_dz_xhat = tl.zeros([CHANNELS], tl.float32)
    for tile in range(TILES):
        rows = first_row + tile * ROWS + local_rows
        mask = (rows < num_rows)[:, None] & in_channels[None, :]
        x = tl.load(x_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        xhat = (x - mean[None, :]) * inverse_std[None, :]
        if y_ptr is None:
            z = xhat * weight[None, :] + bias[None, :]
        else:
            z = tl.load(y_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        dz = _derivative(dy, z, ACTIVATION)
        sum_dz += tl.sum(dz, 0)
        sum_dz_xhat += tl.sum(dz * xhat, 0)
        base += ROWS * row_stride
    program = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    out = partial_ptr + program * 2 * num_channels + channels
    tl.store(out, sum_dz, in_channels)
    tl.store(out + num_channels, sum_dz_xhat, in_channels)


@triton.jit
def backward_kernel(
    dy_ptr,
    x_ptr,
    y_ptr,  # or None, and z is computed again
    dx_ptr,
    dz_ptr,  # or None
    mean_ptr,
    inverse_std_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    mean_dz_ptr,
    mean_dz_xhat_ptr,
    num_rows,
    num_channels,
    batch_stride,
    row_stride,
    channel_stride,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """dx, and dz for the residual."""
    first_row, base, channels, in_channels = _locate(
        num_rows, num_channels, batch_stride, row_stride, channel_stride, ROWS, CHANNELS, TILES
    )
    mean = _per_channel(mean_ptr, channels, in_channels, 0.0)
    inverse_std = _per_channel(inverse_std_ptr, channels, in_channels, 1.0)
    weight = _per_channel(weight_ptr, channels, in_channels, 1.0)
    bias = _per_channel(bias_ptr, channels, in_channels, 0.0)
    mean_dz = _per_channel(mean_dz_ptr, channels, in_channels, 0.0)
    mean_dz_xhat = _per_channel(mean_dz_xhat_ptr, channels, in_channels, 0.0)
    local_rows = tl.arange(0, ROWS)
    offsets = local_rows[:, None] * row_stride + tl.arange(0, CHANNELS)[None, :] * channel_stride
    for tile in range(TILES):
        rows = first_row + tile * ROWS + local_rows
        mask = (rows < num_rows)[:, None] & in_channels[None, :]
        x = tl.load(x_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        xhat = (x - mean[None, :]) * inverse_std[None, :]
        if y_ptr is None:
            z = xhat * weight[None, :] + bias[None, :]
        else:
            z = tl.load(y_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        dz = _derivative(dy, z, ACTIVATION)
        if dz_ptr is not None:
            tl.store(dz_ptr + base + offsets, dz, mask)
        dx = (weight * inverse_std)[None, :] * (dz - mean_dz[None, :] - xhat * mean_dz_xhat[None, :])
        tl.store(dx_ptr + base + offsets, dx, mask)
        base += ROWS * row_stride


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its data."""

    rows: int
    channels: int
    tiles: int
    num_warps: int


# Alternatives, timed once for each kind of data on the device. A tile of 2^12 16-bit or 2^11 32-bit elements gives each
# of 128 threads two or four independent 16-byte accesses, which is what Ampere (1.5 TB/s to 2 TB/s over 108
# multiprocessors) needs in flight; Hopper has half again to twice the bandwidth per multiprocessor and is fed by twice
# the warps on a larger tile. More tiles a program mean fewer partial sums to merge, fewer tiles more programs on small
# data. Channels-last tiles are as wide as a few cache lines, contiguous ones as long as a plane.
CHANNELS_LAST = (Tiling(32, 128, 8, 8), Tiling(32, 64, 8, 4), Tiling(64, 64, 16, 8), Tiling(64, 32, 4, 4))
CONTIGUOUS = (Tiling(2048, 1, 2, 8), Tiling(4096, 1, 1, 16), Tiling(1024, 2, 2, 8), Tiling(512, 4, 1, 8))


@dataclass(frozen=True)
class Layout:
    """Data as the kernels see them: (batches, rows, channels)."""

    batches: int
    rows: int
    channels: int
    strides: tuple[int, int, int]
    tiling: Tiling

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs along rows, channels and batches."""
        tiling = self.tiling
        return (
            triton.cdiv(self.rows, tiling.rows * tiling.tiles),
            triton.cdiv(self.channels, tiling.channels),
            self.batches,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """What every kernel takes to find its tile."""
        return (self.rows, self.channels, *self.strides)

    @property
    def tile(self) -> dict[str, int]:
        """The constants of the kernels."""
        tiling = self.tiling
        return {"ROWS": tiling.rows, "CHANNELS": tiling.channels, "TILES": tiling.tiles, "num_warps": tiling.num_warps}


def layout_of(x: Tensor, tiling: Tiling | None = None) -> Layout:
    """The layout of a dense tensor."""
    channels = x.shape[1]
    if dense_format(x) is not torch.contiguous_format or x.numel() == x.shape[0] * channels:
        rows = x.numel() // channels
        return Layout(1, rows, channels, (0, channels, 1), tiling or CHANNELS_LAST[0])
    rows = x.numel() // (x.shape[0] * channels)
    return Layout(x.shape[0], rows, channels, (rows * channels, 1, rows), tiling or CONTIGUOUS[0])


_fastest: dict[Any, Tiling] = {}


def tuned_layout(x: Tensor) -> Layout:
    """The layout with the tiling that is fastest on this device for data of this kind."""
    default = layout_of(x)
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return default
    key = (x.device, x.dtype, default.strides[1:], x.numel().bit_length())
    if key not in _fastest:
        y, ones = torch.empty_like(x), x.new_ones(x.shape[1], dtype=torch.float32)

        def seconds(tiling: Tiling) -> float:
            layout = layout_of(x, tiling)
            arguments = (x, None, y, ones, ones, None, None, *layout.shape)
            launch = forward_kernel[layout.grid]
            return float(triton.testing.do_bench(lambda: launch(*arguments, ACTIVATION="none", **layout.tile), 2, 10))

        _fastest[key] = min(CHANNELS_LAST if default.strides[2] == 1 else CONTIGUOUS, key=seconds)
    return layout_of(x, _fastest[key])


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `layers.kernels.bn_act.forward_reference`."""
    mean, inverse_std, variance = _statistics(x, tuned_layout(x), eps, group)
    return apply(x, residual, weight, bias, mean, inverse_std, activation), mean, inverse_std, variance


def apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    activation: str,
) -> Tensor:
    """activation(batch_norm(x) + residual) from statistics that are known."""
    layout, y = tuned_layout(x), torch.empty_like(x)
    forward_kernel[layout.grid](
        x, residual, y, mean, inverse_std, weight, bias, *layout.shape, ACTIVATION=activation, **layout.tile
    )
    return y


def _statistics(x: Tensor, layout: Layout, eps: float, group: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, _, batches = layout.grid
    count = layout.batches * layout.rows
    partial = x.new_empty((rows * batches, 2, layout.channels), dtype=torch.float32)
    statistics = x.new_empty((3, layout.channels), dtype=torch.float32)
    moments_kernel[layout.grid](x, partial, *layout.shape, **layout.tile)
    finish_kernel[(triton.cdiv(layout.channels, 32),)](
        partial,
        statistics,
        rows * batches,
        rows,
        layout.rows,
        layout.channels,
        float(count),
        eps,
        ROWS_PER_PROGRAM=layout.tiling.rows * layout.tiling.tiles,
        PROGRAMS=32,
        CHANNELS=32,
    )
    mean, inverse_std, variance = statistics.unbind()
    if not group:
        return mean.clone(), inverse_std.clone(), variance.clone()
    wide = mean.double()
    biased = variance.double() * ((count - 1) / count)
    sums = torch.cat([wide * count, (biased + wide.square()) * count, wide.new_tensor([count])])
    return statistics_of_sums(all_reduced(sums, group), eps, statistics_dtype(x))


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    activation: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `layers.kernels.bn_act.backward_reference`; dz is empty where it is not needed."""
    layout = tuned_layout(x)
    rows, _, batches = layout.grid
    partial = x.new_empty((rows * batches, 2, layout.channels), dtype=torch.float32)
    affine = (mean, inverse_std, weight, bias)
    sums_kernel[layout.grid](dy, x, y, partial, *affine, *layout.shape, ACTIVATION=activation, **layout.tile)
    dbias, dweight = partial.sum(0).unbind()
    mean_dz, mean_dz_xhat = synchronised_means(dbias, dweight, x, group)
    dx = torch.empty_like(x)
    dz = torch.empty_like(x) if y is not None and activation != "none" else None
    backward_kernel[layout.grid](
        dy,
        x,
        y,
        dx,
        dz,
        *affine,
        mean_dz,
        mean_dz_xhat,
        *layout.shape,
        ACTIVATION=activation,
        **layout.tile,
    )
    return dx, dweight.clone(), dbias.clone(), x.new_empty(0) if dz is None else dz
