"""Whether a graph treats the examples of a batch one by one, so that a batch can be run in parts."""

from __future__ import annotations

import operator
from typing import Any, Literal

import torch
from torch import Tensor, fx

from layers.inference.rewrite import arguments, aten

# What a node gives: the same for every batch, a number that depends on the batch's size, or so many rows of every
# example after each other along its first axis, and the batch on no other axis.
_Kind = Literal["same", "size", "examples"]

# An operator that takes and gives examples cannot mix them by contracting, reducing, cutting or moving their axis: that
# would show in the shape. These do nothing else either:
_ONE_BY_ONE = {
    *(aten.conv1d, aten.conv2d, aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
    *(aten.linear, aten.addmm, aten.mm, aten.bmm, aten.baddbmm, aten.matmul),
    *(aten._native_batch_norm_legit_no_training, aten.group_norm, aten.layer_norm, aten.native_layer_norm),
    *(aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d),
    *(aten.max_pool2d_with_indices, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d),
    *(aten.mean, aten.sum, aten.amax, aten.amin, aten.constant_pad_nd, aten.pad, aten.pixel_shuffle),
    *(aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d),
    *(aten.clone, aten.contiguous, aten._to_copy, aten.to, aten.alias, aten.squeeze, aten.unsqueeze),
    *(aten.permute, aten.transpose, aten.t, aten.flatten, aten.unflatten),
}
_TOLD_SIZES = {aten.view, aten._unsafe_view, aten.reshape, aten.expand}  # nor do these, which may be told sizes
_ALONG_AN_AXIS = {  # nor these where their axis is another
    *(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.cumsum),
    *(aten.cat, aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind),
}
_ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.floordiv)


def batched_inputs(model: fx.GraphModule) -> tuple[bool, ...] | None:
    """Which inputs hold the examples of a batch along their first axis; None where the graph may mix these.

    Every operator must be known to treat them one by one, and everything that is returned must hold them.
    """
    inputs = [node for node in model.graph.nodes if node.op == "placeholder"]
    symbols = {size.node.expr for node in inputs for size in node.meta["val"].shape if _varies(size)}
    if len(symbols) != 1:
        return None
    kinds = _Kinds(symbols.pop())
    for node in model.graph.nodes:
        if node.op == "output":
            return kinds.of(inputs) if all(kinds.known.get(n) == "examples" for n in node.all_input_nodes) else None
        kind = kinds.find(node)
        if kind is not None:
            kinds.known[node] = kind
        elif node.users:
            return None
    return None


def _varies(size: Any) -> bool:
    return isinstance(size, torch.SymInt)


class _Kinds:
    def __init__(self, symbol: Any) -> None:
        self._symbol = symbol
        self.known: dict[fx.Node, _Kind] = {}

    def of(self, nodes: list[fx.Node]) -> tuple[bool, ...]:
        return tuple(self.known[node] == "examples" for node in nodes)

    def find(self, node: fx.Node) -> _Kind | None:
        """What a node gives, or None where that is not known."""
        value: Any = node.meta.get("val")
        if node.op == "get_attr":
            return "same"
        if node.op == "placeholder":
            return "examples" if self._first(value) else None if any(map(_varies, value.shape)) else "same"
        sources = {self.known[source] for source in node.all_input_nodes}
        if sources <= {"same"}:
            return "same" if isinstance(node.target, torch._ops.OpOverload) else None
        if _varies(value):
            return "size" if node.target in (*_ARITHMETIC, aten.sym_size.int) else None
        if node.target is operator.getitem or self._one_by_one(node, told_sizes="size" in sources):
            several = isinstance(value, list | tuple)  # each of which is looked at where it is taken out
            return "examples" if several or self._first(value) else None
        return None

    def _first(self, value: Any) -> bool:
        """Whether the batch is the first axis of a tensor, and no other."""
        if not isinstance(value, Tensor) or not value.dim() or not _varies(value.shape[0]):
            return False
        length: Any = value.shape[0]
        rows = length.node.expr / self._symbol
        return bool(rows.is_Integer) and not any(map(_varies, value.shape[1:]))

    def _one_by_one(self, node: fx.Node, told_sizes: bool) -> bool:
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        packet, first = node.target.overloadpacket, node.all_input_nodes[0]
        if told_sizes or packet in _TOLD_SIZES:
            return packet in _TOLD_SIZES
        if packet in _ALONG_AN_AXIS:
            return arguments(node)["dim"] % first.meta["val"].dim() != 0
        if packet is aten.scaled_dot_product_attention:
            return first.meta["val"].dim() > 2  # of two axes, the first is that of the sequence
        if packet is aten.embedding:
            return self.known[first] == "same"
        return packet in _ONE_BY_ONE or torch.Tag.pointwise in node.target.tags
