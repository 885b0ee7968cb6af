"""`highway_gates` in Triton: one pass over memory, in the order in which the elements are stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from layers.kernels.bn_act_triton_kernels import _activate, _derivative

# Elements of a program: 8 a thread, two 16-byte accesses in 32 bits and one in 16, of three or four tensors at once,
# which is enough in flight for Ampere's and Hopper's memory alike.
BLOCK = 1024


@triton.jit
def forward_kernel(h_ptr, t_ptr, x_ptr, c_ptr, y_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """c_ptr may be None."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32)
    y = _activate(tl.load(h_ptr + offsets, mask, other=0.0).to(tl.float32), ACTIVATION)
    gate = tl.sigmoid(tl.load(t_ptr + offsets, mask, other=0.0).to(tl.float32))
    if c_ptr is None:
        y = x + gate * (y - x)
    else:
        y = y * gate + x * tl.sigmoid(tl.load(c_ptr + offsets, mask, other=0.0).to(tl.float32))
    tl.store(y_ptr + offsets, y, mask)


@triton.jit
def backward_kernel(
    dy_ptr, h_ptr, t_ptr, x_ptr, c_ptr, dh_ptr, dt_ptr, dx_ptr, dc_ptr, size,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """c_ptr and dc_ptr may be None."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    dy = tl.load(dy_ptr + offsets, mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + offsets, mask, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.load(t_ptr + offsets, mask, other=0.0).to(tl.float32))
    y = _activate(h, ACTIVATION)
    tl.store(dh_ptr + offsets, _derivative(dy * gate, h, ACTIVATION), mask)
    if c_ptr is None:
        carry = 1 - gate
        y -= x
    else:
        carry = tl.sigmoid(tl.load(c_ptr + offsets, mask, other=0.0).to(tl.float32))
        tl.store(dc_ptr + offsets, dy * x * carry * (1 - carry), mask)
    tl.store(dt_ptr + offsets, dy * y * gate * (1 - gate), mask)
    tl.store(dx_ptr + offsets, dy * carry, mask)


def forward(h: Tensor, t: Tensor, x: Tensor, c: Tensor | None, activation: str) -> Tensor:
    """As `layers.kernels.highway.forward_reference`, of tensors stored alike."""
    y = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), BLOCK),)
    forward_kernel[grid](h, t, x, c, y, x.numel(), ACTIVATION=activation, BLOCK=BLOCK)
    return y


def backward(
    dy: Tensor, h: Tensor, t: Tensor, x: Tensor, c: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `layers.kernels.highway.backward_reference`, of tensors stored alike."""
    dh, dt, dx = (torch.empty_like(x) for _ in range(3))
    dc = None if c is None else torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), BLOCK),)
    backward_kernel[grid](dy, h, t, x, c, dh, dt, dx, dc, x.numel(), ACTIVATION=activation, BLOCK=BLOCK)
    return dh, dt, dx, x.new_empty(0) if dc is None else dc
