"""What a model costs: parameters, multiply-accumulates, bytes, seconds; and how cost falls when channels go."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from compress.channels import ChannelGraph
from compress.labels import FIXED, Array
from compress.recorder import Op, TensorRef, Trace
from compress.sandbox import untouched, unwrapped
from compress.trace import ExampleInputs, as_arguments, record
from layers.clock import own_clock, wait

PAIRS, PAIRS_SECONDS = 15, 1.0  # of runs that are compared
OWN_RUNS = 5


@dataclass(frozen=True)
class Cost:
    """Number of parameters, multiply-accumulates of one forward pass, and bytes of parameters and buffers."""

    params: int
    macs: int
    bytes: int


def measure(model: nn.Module, example_inputs: ExampleInputs) -> Cost:
    """Cost of ``model`` on ``example_inputs`` in evaluation mode; nothing is computed (tensors without data).

    MACs are half of what ``torch.utils.flop_counter`` counts: convolutions, matrix products and attention.

    >>> measure(nn.Linear(3, 4), torch.zeros(2, 3))
    Cost(params=16, macs=24, bytes=64)
    """
    model = unwrapped(model)
    return cost_of(model, record(model, example_inputs, training=False))


def cost_of(model: nn.Module, trace: Trace) -> Cost:
    """The cost of a model that was traced already."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    params = sum({id(p): p.numel() for p in model.parameters()}.values())
    return Cost(params, sum(macs_of(op) for op in trace.evaluation), sum(t.numel() * t.element_size() for t in tensors))


def macs_of(op: Op) -> int:
    """Multiply-accumulates of one operator by PyTorch's own formulas; 0 for operators that have none."""
    if op.formula is None:
        return 0
    arguments = tree_map_only(TensorRef, lambda ref: torch.Size(ref.shape), dict(op.arguments))
    shapes = [torch.Size(ref.shape) for ref in op.outputs]
    positional, named = op.as_called(arguments)
    return int(op.formula(*positional, **named, out_val=shapes[0] if len(shapes) == 1 else tuple(shapes))) // 2


def latency(model: nn.Module, example_inputs: ExampleInputs, *, repeats: int = 15) -> float:
    """Seconds of one forward pass in evaluation mode: the median of ``repeats`` runs after a warm-up."""
    return latencies([model], example_inputs, repeats=repeats)[0]


def latencies(models: Sequence[nn.Module], example_inputs: ExampleInputs, *, repeats: int = 15) -> list[float]:
    """Median seconds of each model, measured in turn (A B A B ...), so that a machine's drift meets all alike."""
    args, kwargs = as_arguments(example_inputs)
    times: list[list[float]] = [[] for _ in models]
    with ExitStack() as stack, torch.inference_mode():
        for model in models:
            stack.enter_context(untouched(model))
            model.eval()
            model(*args, **kwargs)
        for _ in range(repeats):
            for model, seconds in zip(models, times, strict=True):
                seconds.append(_timed(model, args, kwargs))
    return [median(seconds) for seconds in times]


def relative_latency(
    model: nn.Module, reference: nn.Module, example_inputs: ExampleInputs, *, seconds: float = PAIRS_SECONDS
) -> float:
    """Seconds of ``model`` as a part of those of ``reference``, in turn with it: the median over pairs of runs.

    At least :data:`PAIRS` pairs, and as many as fit into ``seconds``: short runs vary more. By
    :func:`layers.clock.own_clock`.
    """
    args, kwargs = as_arguments(example_inputs)
    ratios: list[float] = []
    with untouched(model), untouched(reference), torch.inference_mode():
        for each in (reference, model):
            each.eval()
            each(*args, **kwargs)
        start, clock = time.perf_counter(), own_clock(_device(reference))
        while len(ratios) < PAIRS or (time.perf_counter() - start < seconds and len(ratios) < 20 * PAIRS):
            dense = _timed(reference, args, kwargs, clock)
            ratios.append(_timed(model, args, kwargs, clock) / dense)
    return median(ratios)


def own_seconds(model: nn.Module, example_inputs: ExampleInputs) -> float:
    """Seconds of one forward pass in evaluation mode: the median of a few runs by :func:`layers.clock.own_clock`."""
    args, kwargs = as_arguments(example_inputs)
    clock = own_clock(_device(model))
    with untouched(model), torch.inference_mode():
        model.eval()
        model(*args, **kwargs)
        return median(_timed(model, args, kwargs, clock) for _ in range(OWN_RUNS))


def _timed(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], clock: Callable[[], float] = time.perf_counter
) -> float:
    _synchronise(model)
    start = clock()
    model(*args, **kwargs)
    _synchronise(model)
    return clock() - start


def _synchronise(model: nn.Module) -> None:
    wait(_device(model))


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


class CostModel:
    """Exact cost as a function of how many units of each group are kept: ``sum of constant x product of lengths``."""

    def __init__(self, graph: ChannelGraph, metric: str, total: int) -> None:
        self._lengths = graph.lengths
        terms = _terms(graph, metric)
        self._constants = np.array([constant for constant, _ in terms], dtype=np.float64)
        width = max((len(rows) for _, rows in terms), default=0)
        unit = self._lengths.matrix.shape[0]  # an extra row of length one pads products with fewer axes
        self._rows = np.array([[*rows, *[unit] * (width - len(rows))] for _, rows in terms], dtype=np.int64)
        self._rows = self._rows.reshape(len(terms), width)
        self.total = total
        # operators whose cost no rule describes are a constant
        self._rest = float(total) - self._sum(graph.sizes)

    def __call__(self, kept: Array) -> float:
        """The cost when ``kept[g]`` units of group ``g`` stay, in the metric's own unit."""
        return self._rest + self._sum(kept)

    def _sum(self, kept: Array) -> float:
        lengths = np.append(self._lengths.fixed + self._lengths.matrix @ kept, 1).astype(np.float64)
        return float((self._constants * lengths[self._rows].prod(axis=1)).sum())


def _terms(graph: ChannelGraph, metric: str) -> list[tuple[int, list[int]]]:
    labels = graph.labels
    if metric == "macs":
        products = [(product.constant, product.axes) for product in labels.products]
    else:
        names = [name for name in graph.trace.parameters if name not in graph.trace.buffers]
        products = [(1, labels[graph.trace.parameters[name]]) for name in names]
    terms = []
    for constant, axes in products:
        live = [axis for axis in axes if (axis != FIXED).any()]
        fixed = math.prod(len(axis) for axis in axes if not (axis != FIXED).any())
        terms.append((constant * fixed, [graph.lengths.row(axis) for axis in live]))
    return terms
