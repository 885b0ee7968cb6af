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
from torch import Tensor

from layers.kernels.bn_act import all_reduced, dense_format, statistics_dtype, statistics_of_sums, synchronised_means
from layers.kernels.bn_act_triton_kernels import (
    backward_kernel,
    finish_kernel,
    forward_kernel,
    moments_kernel,
    sums_kernel,
)


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
