"""What a graph computes from constants alone, and what it does for nothing."""

from __future__ import annotations

import sys

import torch
from torch import fx

from layers.inference.capture import constant, value_of
from layers.inference.rewrite import arguments, aten, clean, replace

_IDENTITY = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
_GROWTH = 2  # how much larger than its sources a precomputed constant may be: what expands is not worth its memory


@torch.no_grad()
def simplify(model: fx.GraphModule) -> list[str]:
    """Work out what depends on constants only (normalised or quantised weights, positions), drop identities.

    Views become reshapes: the layout of a tensor may change under them.
    """
    found = []
    for node in list(model.graph.nodes):
        if node.op != "call_function":
            continue
        if _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        elif _precompute(model, node):
            found.append(node.name)
    clean(model)
    return [f"precomputed {len(found)} operator(s) on constants"] if found else []


def _does_nothing(node: fx.Node) -> bool:
    returned = any(user.op == "output" for user in node.users)  # what is returned must stay a tensor of its own
    if returned or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is aten.dropout.default:
        return not arguments(node)["train"]
    if node.target is aten.slice.Tensor:  # x[:, 0] begins with x[:]
        given = arguments(node)
        return not given["start"] and given["end"] in (None, sys.maxsize) and given["step"] == 1
    return node.target in _IDENTITY or (node.target is aten.clone.default and not node.kwargs)


def _precompute(model: fx.GraphModule, node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    sources = [value_of(model, source) for source in node.all_input_nodes]
    if not sources or any(source is None for source in sources) or node.target._schema.is_mutable:
        return False
    values = {source: value_of(model, source) for source in node.all_input_nodes}
    result = node.target(*fx.map_arg(node.args, values.__getitem__), **fx.map_arg(node.kwargs, values.__getitem__))
    size = sum(value.numel() for value in values.values() if value is not None)
    if not isinstance(result, torch.Tensor) or result.numel() > _GROWTH * max(size, 1024):
        return False
    with model.graph.inserting_before(node):
        replace(node, constant(model, model.graph, result))
    return True
