"""The kernels of `bn_act` in Triton: see :mod:`layers.kernels.bn_act_triton`, which launches them."""

import triton
import triton.language as tl


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
