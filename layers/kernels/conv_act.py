"""Convolution, residual and activation as one operator for inference, where batch norm is folded into the weights.

    y = activation(conv2d(x) + residual)

CPU: oneDNN's convolution, which adds and activates before it writes. CUDA: cuDNN's where it has the combination (relu,
channels-last half precision); else the product of `linear_act` for 1 x 1 kernels on channels-last data, and otherwise
the convolution and one pass over its result.
"""

import torch
from torch import Tensor

from layers.kernels.bn_act import ACTIVATIONS, Activation, activate, dense_format
from layers.kernels.bn_act_conv import pair
from layers.kernels.conv_bn_act import ConvArguments
from layers.kernels.dispatch import uses_triton

# As oneDNN's operators name them, with their parameters.
_ONEDNN: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
}


@torch.library.custom_op("prunus::conv_act", mutates_args=())
def _conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = (stride, padding, dilation, groups)
    if uses_triton(x):
        return _on_cuda(x, weight, bias, residual, activation, *geometry)
    if _onednn_takes(x, weight):
        return _onednn(x, weight, bias, residual, activation, *geometry)
    return reference(x, weight, bias, residual, activation, *geometry)


@_conv_act.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y.contiguous(memory_format=dense_format(x))


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The specification."""
    z = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    z = activate(z if residual is None else z + residual, activation)
    return z.contiguous(memory_format=dense_format(x))


def _onednn_takes(x: Tensor, weight: Tensor) -> bool:
    half = x.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    half = half or (x.dtype is torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return (
        not x.is_cuda
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and (x.dtype is torch.float32 or half)
        and x.numel() * weight.numel() > 0
    )


def _onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    fused, parameters = _ONEDNN[activation]
    geometry = (padding, stride, dilation, groups)
    operator = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        y = operator(x, weight, bias, *geometry, fused, parameters, "")
    elif x.dtype is torch.float32 and activation in ("none", "relu"):
        after = None if activation == "none" else fused
        y = operator.binary(x, residual, weight, bias, *geometry, "add", 1.0, after, [], "")
    else:  # it does not follow a sum with anything but relu, nor adds every half-precision tensor
        y = activate(operator(x, weight, bias, *geometry, "none", [], "").add_(residual), activation)
    return y.contiguous(memory_format=dense_format(x))


def _on_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    from layers.kernels import bn_act_triton

    channels_last = dense_format(x) is torch.channels_last
    if channels_last and weight[0, 0].numel() == 1 and groups == 1 and stride == [1, 1] and padding == [0, 0]:
        rows = None if residual is None else residual.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])
        matrix = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        y = torch.ops.prunus.linear_act(matrix, weight.flatten(1), bias, rows, activation)
        return y.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
    if x.is_cuda and channels_last and activation == "relu" and x.dtype is torch.float16:
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)
    z = torch.conv2d(x, weight, None, stride, padding, dilation, groups).contiguous(memory_format=dense_format(x))
    zeros, ones = z.new_zeros(z.shape[1], dtype=torch.float32), z.new_ones(z.shape[1], dtype=torch.float32)
    shift = None if bias is None else bias.float()
    return bn_act_triton.apply(z, residual, None, shift, zeros, ones, activation)


def conv_act(
    x: Tensor, conv: ConvArguments, residual: Tensor | None = None, *, activation: Activation = "relu"
) -> Tensor:
    """activation(conv2d(x) + residual), for inference: the result has no gradient.

    `x` has shape (batch, in, height, width), `residual` and the result (batch, out, height', width'), in the layout of
    x: contiguous or channels-last. All tensors are of one dtype. `conv.padding` must be numbers.

    Raises ValueError for other shapes and dtypes, and for an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"conv_act: activation is {activation!r}; give one of {', '.join(ACTIVATIONS)}")
    if x.dim() != 4 or conv.weight.dim() != 4 or conv.weight.shape[1] * conv.groups != x.shape[1]:
        raise ValueError(
            f"conv_act: x of shape {tuple(x.shape)} and conv.weight of shape {tuple(conv.weight.shape)}; expected "
            f"(batch, in, height, width) and (out, in / groups, height, width) with {conv.groups} groups"
        )
    if isinstance(conv.padding, str):
        raise ValueError(f"conv_act: padding is {conv.padding!r}; give numbers")
    geometry = (pair(conv.stride), pair(conv.padding), pair(conv.dilation), conv.groups)
    if residual is not None:
        kernel, (stride, padding, dilation) = conv.weight.shape[2:], geometry[:3]
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
        ]
        expected = (x.shape[0], conv.weight.shape[0], *size)
        if residual.shape != expected or residual.dtype != x.dtype:
            raise ValueError(
                f"conv_act: residual is {residual.dtype} of shape {tuple(residual.shape)}; "
                f"expected {x.dtype} of {expected}"
            )
        residual = residual.contiguous(memory_format=dense_format(x))
    with torch.no_grad():
        x = x.contiguous(memory_format=dense_format(x))
        y: Tensor = _conv_act(x, conv.weight, conv.bias, residual, activation, *geometry)
        return y
