"""How PyTorch can compute a fused layer: several operators, each the fastest for some shapes.

Which one is, depends on the machine as much as on the shape. On a Xeon with AVX-512 (one thread, batch 1), oneDNN's
fused convolution spends 30 us of a call finding its code, and 65 us on 32 channels of 16 x 16 pixels, for which im2col
and a matrix product take 47; with 512 channels of 7 x 7 pixels, weights in its own layout save it 0.9 of 2.4 ms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layers.inference.fuse import FusedLayer
from layers.inference.rewrite import aten
from layers.kernels import conv_act, linear_act  # noqa: F401 - they register what is called below
from layers.kernels.dispatch import uses_triton

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
mkldnn = torch.ops.mkldnn
prunus = torch.ops.prunus
Constants = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Kernel:
    """``kernel(x, *constants, residual)`` computes ``layer``; ``constants`` are made from its weight and bias.

    Calls consist of operators only, so that they can be written into a graph. ``size`` is that of the weight's kernel.
    """

    layer: FusedLayer
    size: tuple[int, ...] = ()

    def constants(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Constants | None:
        """What to give in the place of weight and bias, or None where the kernel cannot compute the layer."""
        raise NotImplementedError

    def __call__(self, x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
        """Of tensors, or of proxies of them: calls are written into the graph then."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(Kernel):
    """The layer's own operator, and the rest in place."""

    def constants(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Constants | None:
        return channels_last(weight), bias

    def __call__(self, x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
        return self.layer(x, weight, bias, residual)


@dataclass(frozen=True)
class Im2col(Kernel):
    """A convolution as a matrix product over unfolded pixels, which PyTorch chooses by itself for few shapes only."""

    def constants(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Constants | None:
        if self.layer.layer is not aten.conv2d.default or x.dim() != 4 or x.is_cuda:
            return None
        _, _, dilation, groups = self.layer.options
        return (channels_last(weight), bias) if groups == 1 and set(_per_axis(dilation, 2)) == {1} else None

    def __call__(self, x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
        stride, padding = (_per_axis(option, 2) for option in self.layer.options[:2])
        y = aten._slow_conv2d_forward.default(x, weight, list(self.size), bias, stride, padding)
        return self.layer.finish(y, residual)


@dataclass(frozen=True)
class Pointwise(Kernel):
    """A convolution of 1 x 1 as the product of a matrix of pixels by channels."""

    def constants(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Constants | None:
        if self.layer.layer is not aten.conv2d.default or x.dim() != 4 or set(self.size) != {1}:
            return None
        stride, padding, _, groups = self.layer.options
        if groups != 1 or set(_per_axis(stride, 2)) != {1} or any(_per_axis(padding, 2)):
            return None
        return weight.flatten(1).contiguous(), bias

    def __call__(self, x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
        y = aten.linear.default(aten.permute.default(x, [0, 2, 3, 1]), weight, bias)
        return self.layer.finish(aten.permute.default(y, [0, 3, 1, 2]), residual)


@dataclass(frozen=True)
class Onednn(Kernel):
    """oneDNN's convolution or matrix product with weights in its own layout, and the rest fused where it can."""

    def constants(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Constants | None:
        if x.dtype != torch.float32 or x.is_cuda or not torch.backends.mkldnn.is_available():
            return None
        if self.layer.layer is aten.linear.default:
            return mkldnn._reorder_linear_weight.default(weight, x.numel() // x.shape[-1]), bias
        if self.layer.layer not in (aten.conv2d.default, aten.conv3d.default) or x.dim() != weight.dim():
            return None
        shape = self._convolution()
        return mkldnn._reorder_convolution_weight.default(channels_last(weight), *shape, list(x.shape)), bias

    def __call__(self, x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
        if self.layer.layer is aten.linear.default:
            name, *numbers = self._attributes() if residual is None else ("none", [], "")
            y = mkldnn._linear_pointwise.default(x, weight, bias, name, *numbers)
            return y if residual is None else self.layer.finish(y, residual)
        convolution = mkldnn._convolution_pointwise
        if residual is None:
            return convolution.default(x, weight, bias, *self._convolution(), *self._attributes())
        activation = self.layer.activation
        fused = activation is not None and activation.name == "relu"  # the only one that it takes after an addition
        last = "relu" if fused else None
        y = convolution.binary(x, residual, weight, bias, *self._convolution(), "add", 1.0, last, [], "")
        return y if fused or activation is None else activation(y)

    def _convolution(self) -> tuple[list[int], list[int], list[int], int]:
        stride, padding, dilation, groups = self.layer.options
        axes = len(self.size)
        return _per_axis(padding, axes), _per_axis(stride, axes), _per_axis(dilation, axes), groups

    def _attributes(self) -> tuple[str, list[float], str]:
        activation = self.layer.activation
        if activation is None:
            return "none", [], ""
        return activation.name, list(activation.scalars), activation.algorithm


@dataclass(frozen=True)
class Fused(Kernel):
    """The operators of `layers.kernels` where they are in Triton: one kernel, or one pass over memory after cuDNN's."""

    def constants(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Constants | None:
        if not uses_triton(x) or self._activation() is None:
            return None
        if self.layer.layer is aten.linear.default:
            return (weight.contiguous(), bias) if x.dim() == 2 else None
        padding = self.layer.options[1] if self.layer.layer is aten.conv2d.default and x.dim() == 4 else "none"
        return None if isinstance(padding, str) else (channels_last(weight), bias)

    def __call__(self, x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
        if self.layer.layer is aten.linear.default:
            return prunus.linear_act.default(x, weight, bias, residual, self._activation())
        stride, padding, dilation, groups = self.layer.options
        geometry = (_per_axis(stride, 2), _per_axis(padding, 2), _per_axis(dilation, 2), groups)
        return prunus.conv_act.default(x, weight, bias, residual, self._activation(), *geometry)

    def _activation(self) -> str | None:
        """The operators' name for it, None for one that they do not know."""
        activation = self.layer.activation
        known = {"relu": (), "hardtanh": (0.0, 6.0), "swish": ()}
        if activation is None:
            return "none"
        if known.get(activation.name) != activation.scalars:
            return None
        return {"hardtanh": "relu6", "swish": "silu"}.get(activation.name, activation.name)


KERNELS: Sequence[type[Kernel]] = (Plain, Im2col, Pointwise, Onednn, Fused)


def kernels(layer: FusedLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Kernel, Constants]]:
    """What can compute a layer on such an input, with the constants that it takes."""
    for kind in KERNELS:
        kernel = kind(layer, tuple(weight.shape[2:]))
        constants = kernel.constants(x, weight, bias)
        if constants is not None:
            yield kernel, constants


def channels_last(x: Tensor) -> Tensor:
    """The same tensor with its channels next to each other in memory, where it is an image or a volume."""
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim()]) if x.dim() in CHANNELS_LAST else x


def _per_axis(option: Any, axes: int) -> list[int]:
    """An option of a convolution for each axis of its kernel."""
    return [option] * axes if isinstance(option, int) else list(option) * (axes if len(option) == 1 else 1)
