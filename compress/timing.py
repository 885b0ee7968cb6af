"""What widths cost in seconds on the machine at hand: every operator of a trace, timed alone at a few widths.

Seconds do not follow multiply-accumulates: a convolution with 15 channels can take longer than one with 16. Each
operator is therefore run with tensors of the shapes that it would have, and its seconds are kept for the life of the
process, by operator, shapes, device and number of threads.
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compress.channels import ChannelGraph
from compress.labels import FIXED, Array
from compress.recorder import Op, TensorRef
from compress.sandbox import untouched
from layers.clock import own_clock, wait

MULTIPLES = (1, 2, 4, 8, 16, 32)  # what widths may be rounded to: vectors of 8 or 16 numbers, tiles of 16 or 32
WORTH = 0.85  # of the best saving a channel: a finer multiple that reaches it is as good
GRID = (0.1, 0.25, 0.5, 0.75, 1.0)  # parts of a width that are timed; between them the seconds are interpolated
MOST_AXES = 3  # that the table of one operator has
LEAST_RUNS, MOST_RUNS, ENOUGH = 3, 5, 0.01  # runs of an operator, and seconds after which no more; the least counts

_seconds: dict[tuple[Any, ...], float] = {}


@dataclass(frozen=True)
class _Length:
    """The length of an axis: ``fixed`` and so many elements for each kept unit of some groups, ``live`` in all."""

    fixed: int
    live: int = 0
    per_unit: tuple[tuple[int, float], ...] = ()

    def part(self, kept: Array) -> float:
        """Which part of the live elements is left."""
        return sum(n * int(kept[g]) for g, n in self.per_unit) / self.live

    def at(self, part: float) -> int:
        return max(1, self.fixed + round(part * self.live))


@dataclass(frozen=True)
class _TimedOp:
    """An operator with the lengths of its tensors' axes; ``live`` are the different ones that can shrink."""

    op: Op
    shapes: Mapping[int, tuple[_Length, ...]]
    live: tuple[_Length, ...]

    def seconds(self, parts: Sequence[float], device: torch.device) -> float:
        """Seconds when ``parts[i]`` of ``live[i]`` is left."""
        part = dict(zip(self.live, parts, strict=True))
        shapes = {ref: tuple(axis.at(part.get(axis, 1.0)) for axis in axes) for ref, axes in self.shapes.items()}
        return seconds_of(self.op, shapes, device)

    def parts(self, kept: Array) -> list[float]:
        return [length.part(kept) for length in self.live]


class TimeTable:
    """Seconds of a traced model as a function of how many units of each group are kept."""

    def __init__(self, graph: ChannelGraph, model: nn.Module) -> None:
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        timed = [_timed(graph, op) for op in graph.trace.evaluation]
        self._ops = [op for op in timed if op.live]
        self._grids: dict[tuple[int, tuple[float, ...]], float] = {}
        # what does not depend on widths counts all the same: a part of the model's seconds is asked for
        self._rest = sum(op.seconds((), self._device) for op in timed if not op.live)

    def __call__(self, kept: Array) -> float:
        """Seconds when ``kept[g]`` units of group ``g`` stay: over all operators, interpolated between timed widths."""
        return self._rest + sum(self._interpolated(number, op, kept) for number, op in enumerate(self._ops))

    def of_groups(self, groups: Collection[int], kept: Array) -> float:
        """Seconds of the operators that depend on some ``groups``, timed at these very widths."""
        touched = [op for op in self._ops if any(g in groups for length in op.live for g, _ in length.per_unit)]
        return sum(op.seconds(op.parts(kept), self._device) for op in touched)

    def _interpolated(self, number: int, op: _TimedOp, kept: Array) -> float:
        """Multilinear in the lengths that shrink; of an operator with many (concatenation), in their mean."""
        parts = op.parts(kept)
        if len(parts) > MOST_AXES:
            mean = float(np.average(parts, weights=[length.live for length in op.live]))
            corners = [(weight, (part,) * len(parts)) for part, weight in _bracket(mean)]
        else:
            product = list(itertools.product(*map(_bracket, parts)))
            corners = [(math.prod(w for _, w in corner), tuple(part for part, _ in corner)) for corner in product]
        return sum(weight * self._at(number, op, corner) for weight, corner in corners)

    def _at(self, number: int, op: _TimedOp, parts: tuple[float, ...]) -> float:
        if (number, parts) not in self._grids:
            self._grids[number, parts] = op.seconds(parts, self._device)
        return self._grids[number, parts]


def good_multiples(graph: ChannelGraph, table: TimeTable) -> dict[int, int]:
    """For each lump, the finest multiple of it for which removal saves as many seconds a channel as for any.

    Multiples are compared at the largest width, below four fifths, that is an odd multiple and so no multiple of more.
    Where no width saves anything, the coarsest is as good as any.
    """
    found: dict[int, int] = {}
    for index, lump in enumerate(graph.lumps):
        available = min(int(graph.sizes[g]) // n for g, n in lump.units.items())
        groups, units = list(lump.units), np.array(list(lump.units.values()))
        dense = table.of_groups(groups, graph.sizes)
        saved: dict[int, float] = {}
        for multiple in MULTIPLES:
            left = _odd_multiple(multiple, 0.8 * available)
            if left == 0:
                break
            kept = graph.sizes.copy()
            kept[groups] -= (available - left) * units
            saved[multiple] = (dense - table.of_groups(groups, kept)) / (available - left)
        best = max(saved.values(), default=0.0)
        good = [multiple for multiple, value in saved.items() if value >= WORTH * best]
        found[index] = good[0] if best > 0 else max(saved, default=1)
    return found


def seconds_of(op: Op, shapes: Mapping[int, tuple[int, ...]], device: torch.device) -> float:
    """Seconds of ``op`` on tensors of other ``shapes`` (by reference id); 0 if it does not run on its own."""
    arguments = dict(op.arguments)
    if "groups" in arguments and isinstance(arguments.get("weight"), TensorRef) and not arguments.get("transposed"):
        source = next(ref for ref in op.tensors)
        arguments["groups"] = max(1, shapes[source.id][1] // shapes[arguments["weight"].id][1])
    described = tree_map_only(TensorRef, lambda ref: (shapes[ref.id], ref.dtype), arguments)
    key = (str(op.func), repr(described), str(device), torch.get_num_threads())
    if key not in _seconds:
        _seconds[key] = _measured(op, arguments, shapes, device)
    return _seconds[key]


def _measured(
    op: Op, arguments: Mapping[str, Any], shapes: Mapping[int, tuple[int, ...]], device: torch.device
) -> float:
    def filled(ref: TensorRef) -> Tensor:
        make = torch.rand if ref.dtype.is_floating_point else torch.zeros  # indices must lie inside
        return make(shapes[ref.id], dtype=ref.dtype, device=device)

    try:
        positional, named = op.as_called(tree_map_only(TensorRef, filled, dict(arguments)))
        return _least_seconds(lambda: op.func(*positional, **named), device)
    except Exception:  # noqa: BLE001  sizes that are written out (views), values that must fit: no part of the table
        return 0.0


def seconds_of_layer(layer: nn.Module, shape: tuple[int, ...], weight: Tensor) -> float:
    """Seconds of a layer on an input of this shape, like ``weight``; its ``repr`` must tell all of its settings."""
    key = (repr(layer), repr(shape), weight.dtype, str(weight.device), torch.get_num_threads())
    if key not in _seconds:
        source = torch.rand(shape, dtype=weight.dtype, device=weight.device)
        with untouched(layer):
            layer.eval()
            _seconds[key] = _least_seconds(lambda: layer(source), weight.device)
    return _seconds[key]


def _least_seconds(run: Callable[[], object], device: torch.device) -> float:
    clock, times = own_clock(device), list[float]()
    with torch.inference_mode():
        run()
        while len(times) < LEAST_RUNS or (len(times) < MOST_RUNS and sum(times) < ENOUGH):
            wait(device)
            start = clock()
            run()
            wait(device)
            times.append(clock() - start)
    return min(times)


def _timed(graph: ChannelGraph, op: Op) -> _TimedOp:
    shapes = {ref.id: tuple(_length(graph, labels) for labels in graph.labels[ref]) for ref in op.tensors}
    live = {length: None for axes in shapes.values() for length in axes if length.live}
    return _TimedOp(op, shapes, tuple(live))


def _length(graph: ChannelGraph, labels: Array) -> _Length:
    counts = graph.elements_of(labels) if (labels != FIXED).any() else {}
    live = sum(counts.values())
    return _Length(len(labels) - live, live, tuple((g, n / int(graph.sizes[g])) for g, n in counts.items()))


def _bracket(part: float) -> list[tuple[float, float]]:
    """The timed parts on both sides of ``part``, each with its weight."""
    place = next((i for i, point in enumerate(GRID) if point >= part), len(GRID) - 1)
    if place == 0 or GRID[place] == part:
        return [(GRID[place], 1.0)]
    low, high = GRID[place - 1], GRID[place]
    weight = (part - low) / (high - low)
    return [(low, 1 - weight), (high, weight)]


def _odd_multiple(multiple: int, most: float) -> int:
    """The largest odd multiple of ``multiple`` that is at most ``most``; 0 if there is none."""
    times = int(most // multiple)
    return multiple * (times if times % 2 else times - 1) if times else 0
