"""Which ATen operators are cheap to run again, and how: what `layers.memory` may do instead of keeping a result."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from layers.kernels.bn_act import normalise, reapplied

aten = torch.ops.aten

# Normalisation with the batch's own or the running statistics: (x, weight, bias, mean, var, training, momentum, eps) ->
# (y, mean, 1 / standard deviation, ...), one operator for each library that does it.
_BATCH_NORMS = {aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default}
# A convolution of more channels takes too long for what it saves: in ResNet-50 (4 images, one thread) one of 64 takes
# 6 ms for 13 MB, and one of 512 takes 4 ms for 1.6 MB.
_FEW_CHANNELS = 256
# Cheap and deterministic, though not tagged as pointwise.
_POINTWISE = {aten.hardswish.default, aten.hardsigmoid.default, aten.cat.default, aten.constant_pad_nd.default}


@dataclass(frozen=True)
class Recipe:
    """A call that computes a tensor again.

    `steps` is what it counts for in a chain of calls; `in_place` does the same and may write into its first argument.
    """

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    steps: int = 1
    in_place: Callable[..., Tensor] | None = None
    is_view: bool = False

    def without_tensors(self) -> "Recipe":
        """What to do, without keeping alive what to do it with."""
        return Recipe(self.function, (), self.kwargs, self.steps, self.in_place, self.is_view)


# Activations that follow batch norm, by what `layers.kernels.bn_act` calls them.
_ACTIVATIONS: dict[Any, str] = {aten.relu.default: "relu", aten.silu.default: "silu"}


def joined(first: Recipe, then: Recipe) -> Callable[..., Tensor] | None:
    """What computes two steps at once from the arguments of the first: one pass over memory, where a kernel does it."""
    name = _ACTIVATIONS.get(then.function)
    if first.function is not normalise or name is None:
        return None
    return lambda x, weight, bias, mean, inverse_std: reapplied(x, weight, bias, mean, inverse_std, name)


def recipe_of(operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Recipe | None:
    """How to compute `result` (its first tensor, if it has several) again at little cost; None where not known."""
    if operator in _BATCH_NORMS:
        return _batch_norm(args, result)
    if operator is torch.ops.prunus.bn_act.default:
        x, residual, weight, bias, activation, *_ = args
        return Recipe(reapplied, (x, weight, bias, result[1], result[2], activation, residual), {})
    if operator is aten.convolution.default:
        return Recipe(operator, args, kwargs, steps=2) if _widens(*args) else None
    function, in_place = _forms(operator)
    if function is None or (operator is in_place and not _same_as_out_of_place(args)):
        return None
    if any(isinstance(value, Tensor) for value in kwargs.values()):
        return None
    if not isinstance(args[0], Tensor) or (result.shape, result.dtype) != (args[0].shape, args[0].dtype):
        in_place = None
    return Recipe(function, args, kwargs, in_place=in_place, is_view=function.is_view)


@functools.cache
def _forms(operator: OpOverload) -> tuple[OpOverload | None, OpOverload | None]:
    """The operator without and with effect on its first argument, (None, None) if it is not cheap."""
    name = operator._schema.name.split("::")[1]
    namespace = getattr(torch.ops, operator.namespace)
    function = operator
    if operator._schema.is_mutable:
        found = _overload(namespace, name.removesuffix("_"), operator._overloadname) if name.endswith("_") else None
        if found is None:
            return None, None
        function = found
    returns = [str(each.type) for each in function._schema.returns]
    cheap = torch.Tag.pointwise in function.tags or function.is_view or function in _POINTWISE
    random = torch.Tag.nondeterministic_seeded in function.tags
    if not cheap or random or function._schema.is_mutable or returns != ["Tensor"]:
        return None, None
    return function, _overload(namespace, function._schema.name.split("::")[1] + "_", function._overloadname)


def _overload(namespace: Any, name: str, overload: str) -> OpOverload | None:
    packet = getattr(namespace, name, None)
    return getattr(packet, overload) if packet is not None and overload in packet.overloads() else None


def _same_as_out_of_place(args: tuple[Any, ...]) -> bool:
    """Whether writing into the first argument gives the dtype and the strides that a new result would have."""
    target = args[0]
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    formats = [torch.contiguous_format, *{4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(target.dim(), [])]
    return all(t.dtype == target.dtype or t.dim() == 0 for t in tensors) and any(
        target.is_contiguous(memory_format=f) for f in formats
    )


def _widens(x: Tensor, weight: Tensor, *_: Any) -> bool:
    """1 x 1 convolution from few channels to at least twice as many: what saves most for its cost, since every number
    of its result takes as many multiplications as there are channels."""
    out_channels, in_channels, *kernel = weight.shape
    few = in_channels <= min(out_channels // 2, _FEW_CHANNELS)
    return max(kernel, default=1) == 1 and few and x.shape[1] == in_channels


def _batch_norm(args: tuple[Any, ...], result: tuple[Tensor, ...]) -> Recipe:
    x, weight, bias, running_mean, running_var, training, _, eps = args
    if training:
        return Recipe(normalise, (x, weight, bias, result[1], result[2]), {})
    return Recipe(_normalise_running, (x, weight, bias, running_mean, running_var, eps), {})


def _normalise_running(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    y: Tensor = aten.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
    return y
