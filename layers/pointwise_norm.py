"""Batch norm of a 1 x 1 convolution, whose backward pass does not need the convolution's output.

For y = W r (at every pixel) and z = weight (y - m) / s + bias, with the batch's mean m and s = sqrt(variance + eps),
the mean of y is W times the mean of r, so y - m = W (r - mean(r)), and what batch norm's gradient takes from y are
products with W of sums over pixels of r alone:

    G = sum dz r^T                    (out, in), as the convolution's weight gradient takes it anyway
    C = sum (r - mean(r)) (r - mean(r))^T                      (in, in)
    dweight = 1/s sum_j W_j (G - dbias mean(r)^T)_j            dbias = sum dz
    dW = weight/s (G - dbias mean(r)^T - 1/(M s) dweight (W C))
    dr = (weight/s W)^T dz - A (r - mean(r)) - (weight/s W)^T dbias / M   with A = (weight dweight / (M s^2) W)^T W

with M pixels. Where the convolution widens by k, this is 2 / k of the convolution's multiplications in the place of
computing it again (with four times the channels, half), and products of matrices of the weights' size, which are small
where there are more pixels than output channels; and dz is read by matrix products alone: the passes of batch norm's
own backward over y and dz, the largest tensors of a bottleneck block, are gone.

Bulo, Porzi, Kontschieder: In-Place Activated BatchNorm (2018), section 3, save the same bytes by inverting layers; that
the gradient of batch norm is an affine function of dz and y, which is used here, is in Ioffe and Szegedy (2015).
"""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

_CONV2D = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_BATCH_NORM = inspect.signature(F.batch_norm)


class PointwiseNorms(TorchFunctionMode):
    """Inside, batch norm of a 1 x 1 convolution that at least doubles the channels is a `PointwiseNorm`, on CPUs
    in float32 and float64, where there are at least twice as many pixels as output channels.

    Where anything else reads the convolution's output too, that has the convolution's own gradient as ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._output: Callable[[], Tensor | None] = _nothing  # of the last such convolution
        self._version = 0
        self._inputs: tuple[Tensor, ...] = ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:
            y = func(*args, **kwargs)
            inputs = _pointwise(y, **dict(zip(_CONV2D, args, strict=False)), **kwargs)
            if inputs:
                self._output, self._version, self._inputs = weakref.ref(y), y._version, inputs
            return y
        if func is F.batch_norm and self._inputs:
            product, inputs, self._inputs = self._output(), self._inputs, ()
            given = _BATCH_NORM.bind(*args, **kwargs)
            given.apply_defaults()
            x: Tensor
            x, running_mean, running_var, weight, bias, training, momentum, eps = given.arguments.values()
            several = x.numel() > x.shape[1]  # else an error, which is PyTorch's
            if product is x and training and several and x._version == self._version and torch.is_grad_enabled():
                options = (weight, bias, running_mean, running_var, momentum, eps)
                return PointwiseNorm.apply(x.detach(), *inputs, *options)
        return func(*args, **kwargs)


def _nothing() -> None:
    return None


def _pointwise(
    y: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, ...]:
    """Input and kernel, or nothing where `PointwiseNorm` is no gain."""
    wide = weight.dim() == 4 and weight.shape[2:] == (1, 1) and weight.shape[0] >= 2 * weight.shape[1] and groups == 1
    plain = stride in (1, (1, 1)) and padding in (0, (0, 0), "valid", "same") and bias is None and input.dim() == 4
    # Differences of sums in 16 bits would lose what batch norm's own passes, which sum in 32, do not.
    precise = input.dtype is weight.dtype is y.dtype and y.dtype in (torch.float32, torch.float64)
    many = y.numel() >= 2 * y.shape[1] ** 2  # pixels: else products of the weights cost more than those over pixels
    return (input, weight) if wide and plain and precise and many and y.requires_grad and not y.is_cuda else ()


class PointwiseNorm(torch.autograd.Function):
    """batch_norm(y) for y = conv2d(x, kernel), 1 x 1 at stride 1 and without bias, with the gradients of both."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, kernel: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any
    ) -> Tensor:
        running_mean, running_var, momentum, eps = options
        z, _, inverse_std = aten.native_batch_norm(y, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.eps, ctx.has_bias = eps, bias is not None
        ctx.save_for_backward(x, kernel, weight, inverse_std)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel, weight, inverse_std = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            dx, dkernel, dweight, dbias = _differentiable(dz, x, kernel, weight, ctx.eps)
        else:
            dx, dkernel, dweight, dbias = _backward(dz, x, kernel, weight, inverse_std)
        parameters = (None if weight is None else dweight, dbias if ctx.has_bias else None)
        return None, dx, dkernel, *parameters, None, None, None, None


def _backward(
    dz: Tensor, x: Tensor, kernel: Tensor, weight: Tensor | None, inverse_std: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, kernel, weight and bias; sums and small matrices in float32 or better."""
    count, inner = x.numel() // x.shape[1], kernel.shape[1]
    dtype = torch.promote_types(torch.float32, inverse_std.dtype)
    inverse_std = inverse_std.to(dtype)
    scale = inverse_std if weight is None else inverse_std * weight.to(dtype)
    wide = kernel.flatten(1).to(dtype)  # (out, in)
    scaled = scale[:, None] * wide
    dx, cross, dbias = _convolution_backward(dz, x, scaled.to(kernel.dtype).view_as(kernel), [True, True, True])
    _, gram, total = _convolution_backward(x, x, kernel.new_empty(inner, inner, 1, 1), [False, True, True])
    mean, dbias = total.to(dtype) / count, dbias.to(dtype)
    cross = cross.flatten(1).to(dtype) - dbias[:, None] * mean
    gram = gram.flatten(1).to(dtype) - count * mean[:, None] * mean
    dweight = inverse_std * (wide * cross).sum(1)
    share = (inverse_std * dweight / count)[:, None]
    dkernel = scale[:, None] * (cross - share * (wide @ gram))
    inward = scaled.T @ (share * wide)  # (in, in)
    constant = inward @ mean - scaled.T @ dbias / count
    correction = torch.conv2d(x, -inward.to(x.dtype).view(inner, inner, 1, 1), constant.to(x.dtype))
    return dx.add_(correction), dkernel.to(kernel.dtype).view_as(kernel), dweight, dbias


def _convolution_backward(dy: Tensor, x: Tensor, kernel: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(
        dy, x, kernel, [kernel.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, wanted
    )
    return found


def _differentiable(
    dz: Tensor, x: Tensor, kernel: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same by PyTorch's own formulas, which have derivatives."""
    y = torch.conv2d(x, kernel)
    _, mean, inverse_std = aten.native_batch_norm(y, weight, None, None, None, True, 0.0, eps)
    arguments = (None, None, mean, inverse_std, True, eps, [True] * 3)
    dy, dweight, dbias = aten.native_batch_norm_backward(dz, y, weight, *arguments)
    dx, dkernel, _ = _convolution_backward(dy, x, kernel, [True, True, False])
    return dx, dkernel, dweight, dbias
