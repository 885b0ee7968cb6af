"""Small tools for changing graphs of ATen operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.operator_schemas import normalize_function

aten = torch.ops.aten


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen operator by name, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload), node.target
    normal = normalize_function(node.target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)
    assert normal is not None, node.target
    return dict(normal.kwargs)


def replace(node: fx.Node, new: fx.Node) -> None:
    """``new`` stands for ``node``, which goes."""
    new.meta.setdefault("val", node.meta.get("val"))
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads ``node``, once; None where there are several, or none."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if sum(given is node for given in _flat(user.args) + _flat(user.kwargs)) == 1 else None


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """The shape that was traced, symbols included, or None where the node gives no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def clean(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Without what nobody reads, and with its code written anew."""
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    used = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in graph_module.named_buffers() if name not in used]:
        del graph_module._buffers[name]
    graph_module.recompile()
    return graph_module


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _flat(item)]
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list | tuple) else [value]
