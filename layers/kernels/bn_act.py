"""Batch norm with the batch's statistics, residual addition and activation as one operator, forward and backward.

For x of shape (batch, channels, ...), with mean m and variance v of each channel over all other axes (of all ranks of
`group`), in float32 whatever the dtype of x:

    xhat = (x - m) / sqrt(v + eps);  z = weight xhat + bias + residual;  y = activation(z)

Ioffe, Szegedy: Batch Normalization (2015), algorithm 1. For the backward pass it keeps x, and with a residual y instead
of the residual, which the next layer keeps anyway; z is computed again. With dz = dy activation'(z) and M elements a
channel, dweight = sum dz xhat, dbias = sum dz, and

    dx = weight / sqrt(v + eps) (dz - dbias / M - xhat dweight / M)
"""

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from layers.kernels.dispatch import uses_triton

Activation = Literal["none", "relu", "relu6", "silu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

aten = torch.ops.aten


def activate(z: Tensor, activation: str) -> Tensor:
    """activation(z), written into `z` where PyTorch can."""
    if activation == "relu":
        return z.relu_()
    if activation == "relu6":
        return aten.hardtanh_(z, 0.0, 6.0)
    return aten.silu_(z) if activation == "silu" else z


def activation_backward(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """dy activation'(z); for relu and relu6, activation(z) does as well as z."""
    if activation == "relu":
        return aten.threshold_backward(dy, z, 0.0)
    if activation == "relu6":
        return aten.hardtanh_backward(dy, z, 0.0, 6.0)
    if activation == "silu" and torch.is_grad_enabled():  # aten's has no derivative
        gate = z.sigmoid()
        return dy * gate * (1 + z * (1 - gate))
    return aten.silu_backward(dy, z) if activation == "silu" else dy


def check(x: Tensor, residual: Tensor | None, channels: dict[str, Tensor | None], activation: str) -> None:
    """Raise ValueError for what the operator does not take."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"bn_act: activation is {activation!r}; give one of {', '.join(ACTIVATIONS)}")
    if x.dim() < 2:
        raise ValueError(f"bn_act: x has shape {tuple(x.shape)}; expected (batch, channels, ...)")
    if not x.is_floating_point():
        raise ValueError(f"bn_act: x has dtype {x.dtype}; expected a floating-point one")
    for name, tensor in channels.items():
        if tensor is not None and tensor.shape != (x.shape[1],):
            raise ValueError(
                f"bn_act: {name} has shape {tuple(tensor.shape)}; expected ({x.shape[1]},), as x has channels"
            )
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"bn_act: residual is {residual.dtype} of shape {tuple(residual.shape)}; "
            f"expected {x.dtype} of shape {tuple(x.shape)}, as x"
        )
    if residual is not None and activation == "silu":
        raise ValueError("bn_act: silu after a residual would keep one tensor more; add and activate separately")


# Plain PyTorch: specification, and what runs on CPUs. Statistics are (mean, 1 / sqrt(biased variance + eps), unbiased
# variance), (channels,) each, in the dtype below.


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for data of that dtype."""
    return torch.promote_types(torch.float32, x.dtype)


def statistics_of_sums(sums: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """From sum of x, sum of x^2 (channel by channel), and count: float64, shape (2 channels + 1,)."""
    count = sums[-1]
    total, squares = sums[:-1].chunk(2)
    mean = total / count
    variance = (squares / count - mean.square()).clamp_(min=0)
    unbiased = variance * count / (count - 1)
    return mean.to(dtype), (variance + eps).rsqrt().to(dtype), unbiased.to(dtype)


def all_reduced(sums: Tensor, group: str) -> Tensor:
    """Sum over the ranks of the process group of this name ("": this process alone), in place."""
    if group:
        dist.all_reduce(
            sums, group=dist.distributed_c10d._resolve_process_group(dist.distributed_c10d.GroupName(group))
        )
    return sums


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse_std: Tensor) -> Tensor:
    """(x - mean) inverse_std weight + bias, channel by channel (axis 1), in the dtype of x."""
    y: Tensor = aten.native_batch_norm(x, weight, bias, mean, inverse_std.pow(-2), False, 0.0, 0.0)[0]
    return y


def reapplied(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(batch_norm(x) + residual) from statistics that are known."""
    form = dense_format(x)
    if uses_triton(x) and all(t is None or t.is_contiguous(memory_format=form) for t in (x, residual)):
        from layers.kernels import bn_act_triton

        return bn_act_triton.apply(x, residual, weight, bias, mean, inverse_std, activation)
    y = normalise(x, weight, bias, mean, inverse_std)
    return activate(y if residual is None else y.add_(residual), activation)


def forward_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and the statistics."""
    dtype, count = statistics_dtype(x), x.numel() // max(x.shape[1], 1)
    if group:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        wide = x.double()
        sums = torch.cat([wide.sum(axes), wide.square().sum(axes), wide.new_tensor([count])])
        mean, inverse_std, variance = statistics_of_sums(all_reduced(sums, group), eps, dtype)
        y = normalise(x, weight, bias, mean, inverse_std) if x.numel() else torch.empty_like(x)
    else:
        y, mean, inverse_std = aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        mean, inverse_std = mean.to(dtype), inverse_std.to(dtype)
        variance = (inverse_std.pow(-2) - eps).clamp_(min=0) * (count / (count - 1))
    if residual is not None:
        y += residual
    return activate(y, activation), mean, inverse_std, variance


def backward_reference(
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
    """Gradients for x, weight and bias, and dz, that for the residual."""
    if x.numel() == 0 and not group:
        return torch.empty_like(x), torch.zeros_like(mean), torch.zeros_like(mean), torch.empty_like(x)
    if activation == "none":
        dz = dy
    else:
        z = normalise(x, weight, bias, mean, inverse_std) if y is None else y
        dz = activation_backward(dy, z, activation)
    if not group:
        dx, dweight, dbias = aten.native_batch_norm_backward(
            dz, x, weight, None, None, mean, inverse_std, True, 0.0, [True, True, True]
        )
    else:
        shape = (1, -1, *[1] * (x.dim() - 2))
        axes = [axis for axis in range(x.dim()) if axis != 1]
        xhat = (x - mean.view(shape)) * inverse_std.view(shape)
        wide = dz.to(mean.dtype)
        dweight, dbias = (wide * xhat).sum(axes), wide.sum(axes)
        mean_dz, mean_dz_xhat = synchronised_means(dbias, dweight, x, group)
        scale = inverse_std if weight is None else inverse_std * weight
        dx = (scale.view(shape) * (wide - mean_dz.view(shape) - xhat * mean_dz_xhat.view(shape))).to(x.dtype)
    return dx, dweight, dbias, dz


def synchronised_means(dbias: Tensor, dweight: Tensor, x: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Means of dz and of dz xhat over the elements of a channel on all ranks, from the sums of this one."""
    count = dbias.new_tensor([x.numel() // max(x.shape[1], 1)])
    sums = all_reduced(torch.cat([dbias, dweight, count]), group)
    mean_dz, mean_dz_xhat = (sums[:-1] / sums[-1]).chunk(2)
    return mean_dz, mean_dz_xhat


# Registration: functional operators, so that autograd and torch.compile see no side effects.


@torch.library.custom_op("prunus::bn_act", mutates_args=())
def _bn_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if uses_triton(x):
        from layers.kernels import bn_act_triton

        return bn_act_triton.forward(x, residual, weight, bias, activation, eps, group)
    return forward_reference(x, residual, weight, bias, activation, eps, group)


@_bn_act.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, inverse_std, variance = (x.new_empty(x.shape[1], dtype=statistics_dtype(x)) for _ in range(3))
    return torch.empty_like(x), mean, inverse_std, variance


@torch.library.custom_op("prunus::bn_act_backward", mutates_args=())
def _bn_act_backward(
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
    """The fourth result, dz, is empty unless there was a residual (y is given) and an activation."""
    dy = dy.contiguous(memory_format=dense_format(x))
    arguments = (dy, x, y, weight, bias, mean, inverse_std, activation, group)
    if uses_triton(x):
        from layers.kernels import bn_act_triton

        dx, dweight, dbias, dz = bn_act_triton.backward(*arguments)
    else:
        dx, dweight, dbias, dz = backward_reference(*arguments)
    return dx, dweight, dbias, dz if y is not None and activation != "none" else x.new_empty(0)


@_bn_act_backward.register_fake
def _(
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
    has_dz = y is not None and activation != "none"
    dz = torch.empty_like(x) if has_dz else x.new_empty(0)
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), dz


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, ctx.activation, ctx.eps, ctx.group = inputs
    y, mean, inverse_std, _ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, None if residual is None else y, weight, bias, mean, inverse_std)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, y, weight, bias, mean, inverse_std = ctx.saved_tensors
    if torch.is_grad_enabled() and not ctx.group:  # for a second derivative
        z = F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps) if y is None else y
        dz = activation_backward(dy, z, ctx.activation)
        dx, dweight, dbias = aten.native_batch_norm_backward(
            dz, x, weight, None, None, mean, inverse_std, True, ctx.eps, [True] * 3
        )
    else:
        dx, dweight, dbias, dz = _bn_act_backward(dy, x, y, weight, bias, mean, inverse_std, ctx.activation, ctx.group)
    dresidual = None if y is None else dy if ctx.activation == "none" else dz
    return dx, dresidual, None if weight is None else dweight, None if bias is None else dbias, None, None, None


_bn_act.register_autograd(_backward, setup_context=_setup_context)


def dense_format(x: Tensor) -> torch.memory_format:
    """channels_last for what is stored so, else contiguous."""
    for dims, form in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=form) and not x.is_contiguous():
            return form
    return torch.contiguous_format


def bn_act(
    x: Tensor,
    residual: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Activation = "relu",
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """activation(batch_norm(x) + residual) with the batch's own statistics, and these: (y, mean, unbiased variance).

    `x` and `residual` have shape (batch, channels, ...), float32, float64, bfloat16 or float16, contiguous or
    channels-last (anything else is copied); `weight` and `bias` (channels,). `group`: the ranks over whose batches the
    statistics are taken, on any device; None is this process alone. Differentiable in x, residual, weight and bias
    (with a group, once).

    Raises ValueError for other shapes, dtypes and activations, and for one value per channel or less.
    """
    check(x, residual, {"weight": weight, "bias": bias}, activation)
    if group is None and x.numel() <= x.shape[1]:
        raise ValueError(
            f"bn_act: x has shape {tuple(x.shape)}; expected more than 1 value per channel to take statistics"
        )
    form = dense_format(x)
    x, residual = (
        x.contiguous(memory_format=form),
        None if residual is None else residual.contiguous(memory_format=form),
    )
    dtype = statistics_dtype(x)
    weight, bias = None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)
    name = "" if group is None else group.group_name
    y, mean, _, variance = _bn_act(x, residual, weight, bias, activation, eps, name)
    return y, mean, variance
