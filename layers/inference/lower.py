"""Fused layers on the operators that are the fastest for them, timed one by one on the example."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from layers.clock import seconds
from layers.inference.capture import constant
from layers.inference.fuse import FusedLayer
from layers.inference.kernels import CHANNELS_LAST, Constants, Kernel, Onednn, Plain, channels_last, kernels
from layers.inference.rewrite import aten, clean, shape_of

_PER_LAYER = 0.02  # seconds of trying each kernel of a layer

# An operator on its own finds its data in the cache, which flatters those that read more: to be chosen they must win by
# this much over the usual one (measured: mobilenet_v2 at batch 1 took 10.5 ms without and 10.0 with such a margin).
_WORTH = 0.85


@torch.no_grad()
def choose_kernels(model: fx.GraphModule, tensors: list[Tensor], *, timed: bool = True) -> list[str]:
    """Run the graph once, and put the operators of the fastest kernel in the place of every fused layer on the way.

    Without ``timed`` it is the kernel that usually is the fastest.
    """
    choice = _Choice(model, timed)
    choice.run(*tensors)
    tracer = fx.proxy.GraphAppendingTracer(model.graph)
    for node in [node for node in model.graph.nodes if isinstance(node.target, FusedLayer)]:
        x, weight, bias, *residual = node.args
        kernel, constants, to_convert = choice.chosen.get(node, (node.target, None, set()))
        with model.graph.inserting_before(node):
            if constants is not None:
                weight, bias = (None if value is None else constant(model, model.graph, value) for value in constants)
            given = [None if value is None else fx.Proxy(value, tracer) for value in (x, weight, bias, *residual)]
            for position in to_convert:
                dims = shape_of(node)
                assert dims is not None
                given[position] = aten.contiguous.default(given[position], memory_format=CHANNELS_LAST[len(dims)])
            result = kernel(*given).node
        result.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(result)
    clean(model)
    counts = Counter(type(kernel).__name__ for kernel, _, _ in choice.chosen.values())
    return [f"{count} layer(s) by {name}" for name, count in sorted(counts.items())]


class _Choice(fx.Interpreter):
    """``chosen`` is for each layer a kernel, its constants, and which of its arguments to make channels-last."""

    def __init__(self, model: fx.GraphModule, timed: bool) -> None:
        super().__init__(model)
        self._timed = timed
        self.chosen: dict[fx.Node, tuple[Kernel, Constants, set[int]]] = {}
        self._known: dict[Any, type[Kernel]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if not isinstance(n.target, FusedLayer):
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        if args[0].numel() == 0 or args[0].dim() != args[1].dim():
            return n.target(*args)  # nothing to time, or an image without a batch
        images = {position: channels_last(args[position]) for position in (0, 3) if position < len(args)}
        to_convert = {position for position, image in images.items() if image is not args[position]}
        x, residual = images[0], [images[3]] if 3 in images else []
        candidates = {type(kernel): (kernel, given) for kernel, given in kernels(n.target, x, *args[1:3])}
        key = (n.target, x.shape, args[1].shape, args[2] is None)
        if key not in self._known:
            usual = Onednn if Onednn in candidates else Plain
            self._known[key] = self._fastest(candidates, usual, x, residual) if self._timed else usual
        kernel, given = candidates[self._known[key]]
        self.chosen[n] = kernel, given, to_convert
        return kernel(x, *given, *residual)

    def _fastest(self, candidates: Any, usual: type[Kernel], x: Tensor, residual: list[Tensor]) -> type[Kernel]:
        runs = {
            kind.__name__: partial(lambda kernel, given: kernel(x, *given, *residual), kernel, given)
            for kind, (kernel, given) in candidates.items()
        }
        times = seconds(runs, x.device, _PER_LAYER * len(runs))
        others = (kind for kind in candidates if times[kind.__name__] < _WORTH * times[usual.__name__])
        return min(others, key=lambda kind: times[kind.__name__], default=usual)
