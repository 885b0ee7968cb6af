"""Layers with the additions and activations that follow them as one node of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

from torch import fx

from layers.inference.capture import value_of
from layers.inference.norms import CONVOLUTIONS, LINEAR, TRANSPOSED
from layers.inference.rewrite import arguments, aten, clean, only_user, shape_of

_CONV = ("stride", "padding", "dilation", "groups")


_IN_PLACE: dict[str, Any] = {
    "relu": aten.relu_.default,
    "hardtanh": aten.hardtanh_.default,
    "leaky_relu": aten.leaky_relu_.default,
    "swish": aten.silu_.default,
    "hardswish": aten.hardswish_.default,
    "hardsigmoid": aten.hardsigmoid_.default,
    "sigmoid": aten.sigmoid_.default,
    "tanh": aten.tanh_.default,
    "gelu": aten.gelu_.default,
}


@dataclass(frozen=True)
class Activation:
    """An activation by oneDNN's name for it, with its numbers and, for GELU, which approximation of it."""

    name: str
    scalars: tuple[float, ...] = ()
    algorithm: str = ""

    def __call__(self, x: Any) -> Any:
        """In place: only ever used on what a layer has just computed."""
        options = {"approximate": self.algorithm} if self.algorithm else {}
        return _IN_PLACE[self.name](x, *self.scalars, **options)


@dataclass(frozen=True)
class FusedLayer:
    """``activation(layer(x, weight, bias) + residual)``, without the steps that are None.

    The specification of what a node computes, and how it is computed unless a backend has something better.
    """

    layer: Any
    options: tuple[Any, ...] = ()  # what the layer's operator takes after weight and bias
    residual: bool = False
    activation: Activation | None = None

    @property
    def __name__(self) -> str:  # what torch.fx calls a node after
        return "fused_layer"

    def __call__(self, x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
        y = self.layer(x, weight, bias, *self.options)
        return self.finish(y, residual)

    def finish(self, y: Any, residual: Any) -> Any:
        """What follows the layer, in place."""
        if residual is not None:
            y = aten.add_.Tensor(y, residual)
        return y if self.activation is None else self.activation(y)

    def __str__(self) -> str:
        parts = [str(self.layer).split(".")[1], *["add"] * self.residual]
        return " + ".join([*parts, *([self.activation.name] if self.activation else [])])


def fuse_layers(model: fx.GraphModule) -> list[str]:
    """Join each layer with the addition and the activation that alone read it, in this order."""
    counts: dict[str, int] = {}
    order = {node: number for number, node in enumerate(model.graph.nodes)}
    for node in list(model.graph.nodes):
        if node.target not in (*LINEAR, *CONVOLUTIONS, *TRANSPOSED) or value_of(model, node.args[1]) is None:
            continue
        given = arguments(node)
        options = tuple(_hashable(value) for key, value in given.items() if key not in ("input", "weight", "bias"))
        fused, last, residual = FusedLayer(node.target, options), node, None
        addition = _addition(node, order)
        if addition is not None:
            last, residual = addition
            fused = changed(fused, residual=True)
        following = only_user(last)
        activation = None if following is None else _activation(following)
        if following is not None and activation is not None:
            last, fused = following, changed(fused, activation=activation)
        with model.graph.inserting_before(last):
            inputs = (given["input"], given["weight"], given["bias"], *([] if residual is None else [residual]))
            new = model.graph.create_node("call_function", fused, inputs)
        new.meta["val"] = last.meta.get("val")
        order[new] = order[last]
        last.replace_all_uses_with(new)
        counts[str(fused)] = counts.get(str(fused), 0) + 1
    clean(model)
    return [f"fused {count} x {name}" for name, count in sorted(counts.items()) if " + " in name]


def _hashable(option: Any) -> Any:
    return tuple(option) if isinstance(option, list | tuple) else option


def _addition(layer: fx.Node, order: dict[fx.Node, int]) -> tuple[fx.Node, fx.Node] | None:
    """The addition that alone reads the layer, and what it adds: of the same shape, and there by then."""
    user = only_user(layer)
    if user is None or user.target is not aten.add.Tensor or arguments(user)["alpha"] != 1:
        return None
    others = [given for given in user.args if given is not layer]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or others[0] not in order:
        return None
    same = shape_of(others[0]) == shape_of(layer) == shape_of(user)
    dtypes = {node.meta["val"].dtype for node in (others[0], layer)} if same else set()
    return (user, others[0]) if len(dtypes) == 1 else None


def _activation(node: fx.Node) -> Activation | None:
    name = _NAMES.get(node.target)
    if name is None:
        return None
    given = arguments(node)
    if name == "hardtanh":
        low, high = ("min", "max") if node.target is aten.clamp.default else ("min_val", "max_val")
        limits = (given[low], given[high])
        return None if None in limits else Activation(name, tuple(float(limit) for limit in limits))
    if name == "leaky_relu":
        return Activation(name, (float(given["negative_slope"]),))
    return Activation(name, algorithm=given["approximate"] if name == "gelu" else "")


_NAMES: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.hardtanh.default: "hardtanh",
    aten.clamp.default: "hardtanh",
    aten.leaky_relu.default: "leaky_relu",
    aten.silu.default: "swish",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.gelu.default: "gelu",
}
