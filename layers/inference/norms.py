"""Batch norms of fixed statistics, folded into the layers on either side of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from layers.fold import norm_as_affine, scale_inputs, scale_outputs
from layers.inference.capture import constant, value_of
from layers.inference.rewrite import arguments, aten, clean, only_user, shape_of

LINEAR = (aten.linear.default,)
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
LAYERS = (*LINEAR, *CONVOLUTIONS, *TRANSPOSED)
_NORM = aten._native_batch_norm_legit_no_training.default


@torch.no_grad()
def fold_norms(model: fx.GraphModule) -> list[str]:
    """Fold each batch norm into the layer before it, or else into the layers after it, where that is exact.

    Before it: the norm is all that reads the layer. After it: only layers read the norm, and none pads its input,
    since the padding does not pass through the norm.
    """
    found = {"into the layer before": 0, "into the layers after": 0}
    left = 0
    for node in [node for node in model.graph.nodes if node.target is _NORM]:
        affine = _affine(model, node)
        output = only_user(node)
        if affine is None or output is None or output.target is not operator.getitem or output.args[1] != 0:
            left += 1
        elif _into_previous(model, node, output, *affine):
            found["into the layer before"] += 1
        elif _into_next(model, node, output, *affine):
            found["into the layers after"] += 1
        else:
            left += 1
    clean(model)
    lines = [f"folded {count} batch norm(s) {where}" for where, count in found.items() if count]
    return [*lines, *([f"left {left} batch norm(s) as they are"] if left else [])]


def _affine(model: fx.GraphModule, norm: fx.Node) -> tuple[Tensor, Tensor] | None:
    given = arguments(norm)
    weight, bias, mean, var = (value_of(model, given[key]) for key in ("weight", "bias", "running_mean", "running_var"))
    unknown = (given["weight"] is not None and weight is None) or (given["bias"] is not None and bias is None)
    if mean is None or var is None or unknown:
        return None
    return norm_as_affine(mean, var, weight, bias, given["eps"])


def _into_previous(model: fx.GraphModule, norm: fx.Node, output: fx.Node, scale: Tensor, shift: Tensor) -> bool:
    layer = norm.args[0]
    assert isinstance(layer, fx.Node)
    if layer.target not in LAYERS or only_user(layer) is not norm or not _channels_on_axis_1(layer):
        return False
    given = arguments(layer)
    groups = given["groups"] if layer.target in TRANSPOSED else None
    if not _constant_parameters(model, layer):
        return False
    _set_parameters(model, layer, partial(scale_outputs, scale=scale, shift=shift, transposed_groups=groups))
    output.replace_all_uses_with(layer)
    return True


def _into_next(model: fx.GraphModule, norm: fx.Node, output: fx.Node, scale: Tensor, shift: Tensor) -> bool:
    layers = list(output.users)
    if not layers or not all(_takes_affine(layer, output) for layer in layers):
        return False
    if not all(_constant_parameters(model, layer) for layer in layers):
        return False
    for layer in layers:
        groups = arguments(layer).get("groups", 1)
        _set_parameters(model, layer, partial(scale_inputs, scale=scale, shift=shift, groups=groups))
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    output.replace_all_uses_with(source)
    return True


def _channels_on_axis_1(layer: fx.Node) -> bool:
    """Whether the layer's outputs are on the axis that a norm takes: not so for sequences and without a batch."""
    shape, weight = shape_of(layer), shape_of(layer.args[1])
    if shape is None or weight is None:
        return False
    return len(shape) == 2 if layer.target in LINEAR else len(shape) == len(weight)


def _takes_affine(layer: fx.Node, source: fx.Node) -> bool:
    """Whether a scale and shift of each channel of ``source`` before the layer is one of the layer's parameters."""
    if layer.target not in (*LINEAR, *CONVOLUTIONS) or layer.args[0] is not source or source in layer.args[1:]:
        return False
    padding = arguments(layer).get("padding", 0)
    unpadded = padding == "valid" or (not isinstance(padding, str) and not any(_as_list(padding)))
    return unpadded and _channels_on_axis_1(layer)


def _constant_parameters(model: fx.GraphModule, layer: fx.Node) -> bool:
    given = arguments(layer)
    return all(given[key] is None or value_of(model, given[key]) is not None for key in ("weight", "bias"))


def _set_parameters(
    model: fx.GraphModule, layer: fx.Node, change: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
) -> None:
    """Give this call of a layer parameters of its own."""
    given = arguments(layer)
    weight = value_of(model, given["weight"])
    assert weight is not None
    with model.graph.inserting_before(layer):
        nodes = [constant(model, model.graph, value) for value in change(weight, value_of(model, given["bias"]))]
    layer.kwargs = {}
    layer.args = tuple({**given, "weight": nodes[0], "bias": nodes[1]}.values())


def _as_list(value: int | Sequence[int]) -> Sequence[int]:
    return [value] if isinstance(value, int) else value
