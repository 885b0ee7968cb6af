"""Where a run contracts an activation with a weight: convolutions and matrix products, as plain linear regressions.

At such a *site* the output is ``x @ matrix.T`` for rows ``x`` of inputs: the activation itself, or patches of it.
Shapes below: g groups (1 unless the convolution is grouped, or the product batched), R rows, D inputs a group (C_in / g
times the kernel's size), O outputs a group.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.labels import Array, Labels
from compress.recorder import Op, TensorRef, Trace
from compress.rules.registry import base_name

Key = tuple[str, int]


@dataclass(frozen=True)
class Site:
    """One use of a weight by an operator that is linear in its other argument.

    ``use`` counts the uses of ``parameter`` in the run: the pair names the site in any model of the same class, pruned
    or not. ``views`` lead from the parameter to the operator's argument. ``bias`` is a parameter that is added to every
    row by the operator itself.
    """

    op: Op
    parameter: str
    use: int
    argument: str
    views: tuple[Op, ...]
    bias: str | None
    groups: int

    @property
    def key(self) -> Key:
        """What names the site."""
        return self.parameter, self.use

    @property
    def source(self) -> TensorRef:
        """The activation that is read."""
        found = self.op.arguments[self.argument]
        assert isinstance(found, TensorRef)
        return found

    @cached_property
    def place(self) -> int:
        """The position of the activation among the operator's arguments."""
        return [argument.name for argument in self.op.func._schema.arguments].index(self.argument)

    @property
    def result(self) -> TensorRef:
        """What is computed."""
        return self.op.outputs[0]

    @cached_property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size of a convolution; empty for a matrix product."""
        return self.op.arguments["weight"].shape[2:] if self.is_convolution else ()

    @property
    def is_convolution(self) -> bool:
        """Whether rows are patches."""
        return "weight" in self.op.arguments

    @property
    def num_inputs(self) -> int:
        """D."""
        axis = self.source.shape[1 if self.is_convolution else -1]
        return axis * math.prod(self.kernel) // (self.groups if self.is_convolution else 1)

    @property
    def num_outputs(self) -> int:
        """O."""
        axis = self.result.shape[1 if self.is_convolution else -1]
        return axis // (self.groups if self.is_convolution else 1)

    # -- the weight --------------------------------------------------------------------------------------------------

    def matrix(self, parameter: Tensor) -> Tensor:
        """The weight as (g, O, D)."""
        operand = self._operand(parameter.detach())
        if self.is_convolution:
            return operand.reshape(self.groups, self.num_outputs, self.num_inputs)
        return (operand if operand.dim() == 3 else operand.unsqueeze(0)).transpose(1, 2)

    def write(self, parameter: Tensor, matrix: Tensor) -> None:
        """Put (g, O, D) into the parameter, in place."""
        operand = self._operand(parameter.detach())
        values = matrix if self.is_convolution else matrix.transpose(1, 2)
        operand.copy_(values.reshape(operand.shape))

    def kept_outputs(self, removed: Sequence[tuple[int, Array]], shape: Sequence[int]) -> Array:
        """Which output channels (of all groups, in order) are left.

        Args:
            removed: axis and indices of what is removed of the parameter.
            shape: of the parameter.
        """
        stays = torch.ones(tuple(shape), dtype=torch.bool)
        for axis, indices in removed:
            stays.index_fill_(axis, torch.from_numpy(indices), False)
        operand = self._operand(stays)
        kept = operand.flatten(1).any(1) if self.is_convolution else operand.any(-2).reshape(-1)
        return np.flatnonzero(kept.numpy())

    def _operand(self, tensor: Tensor) -> Tensor:
        for op in self.views:
            (_, *options), named = op.as_called(op.arguments)
            found = op.func(tensor, *options, **named)
            tensor = found if isinstance(found, Tensor) else found[0]
        return tensor

    # -- rows --------------------------------------------------------------------------------------------------------

    def num_rows(self, source: Tensor) -> int:
        """R of a batch, all positions of a convolution included."""
        if not self.is_convolution:
            return source.shape[-2]
        return source.shape[0] * math.prod(self._output_shape(source))

    def positions(self, source: Tensor, num_rows: int, generator: torch.Generator) -> Tensor | None:
        """A random choice of positions (or rows) that gives about ``num_rows`` rows of a batch; None for all."""
        samples = source.shape[0] if self.is_convolution else 1
        total, number = self.num_rows(source) // samples, math.ceil(num_rows / samples)
        if number >= total:
            return None
        return torch.randperm(total, generator=generator)[:number].sort().values.to(source.device)

    def rows(self, source: Tensor, positions: Tensor | None) -> Tensor:
        """Inputs (g, R, D), sample by sample."""
        if not self.is_convolution:
            rows = source if source.dim() == 3 else source.unsqueeze(0)
            return rows if positions is None else rows[:, positions]
        patches = self.patches(source, positions)
        return patches.permute(2, 0, 3, 1).reshape(self.groups, len(patches), -1)

    def patches(self, source: Tensor, positions: Tensor | None) -> Tensor:
        """What a convolution reads, as (R, kernel size, g, C_in / g), sample by sample: rows in the order of memory.

        Channels come last, so that a pixel is copied in one piece: five times as fast as gathering single numbers.
        """
        n, channels, *sizes = source.shape
        arguments = self.op.arguments
        options = tuple(tuple(arguments[name]) for name in ("stride", "padding", "dilation"))
        pixels = source.movedim(1, -1)
        if any(padding := arguments["padding"]):
            padded = source.new_zeros(n, *(size + 2 * p for size, p in zip(sizes, padding, strict=True)), channels)
            inside = (slice(p, p + size) for size, p in zip(sizes, padding, strict=True))
            padded[(slice(None), *inside)] = pixels
            pixels = padded
        pixels = pixels.reshape(n, -1, channels)
        if positions is not None or {*self.kernel, *options[0]} != {1}:
            index = _patch_index(tuple(sizes), self.kernel, *options).to(source.device)
            index = index if positions is None else index[positions]
            pixels = pixels.index_select(1, index.reshape(-1))
        return pixels.reshape(-1, math.prod(self.kernel), self.groups, channels // self.groups)

    def outputs(self, result: Tensor, positions: Tensor | None) -> Tensor:
        """Outputs (g, R, O), or anything else of the result's shape, in the order of :meth:`rows`."""
        if not self.is_convolution:
            rows = result if result.dim() == 3 else result.unsqueeze(0)
            return rows if positions is None else rows[:, positions]
        flat = result.flatten(2)
        flat = flat if positions is None else flat[:, :, positions]
        n, _, p = flat.shape
        return flat.reshape(n, self.groups, -1, p).permute(1, 0, 3, 2).reshape(self.groups, n * p, -1)

    def output_axes(self, result: Tensor) -> tuple[int, ...]:
        """The axes that tell the outputs of all groups."""
        if self.is_convolution:
            return (1,)
        return (0, 2) if result.dim() == 3 else (1,)

    def columns(self, labels: Labels) -> Array:
        """The label of each input, shape (g, D)."""
        if not self.is_convolution:
            axes = labels[self.source]
            return np.broadcast_to(axes[-1], (self.groups, len(axes[-1])))
        return np.repeat(labels[self.source][1], math.prod(self.kernel)).reshape(self.groups, -1)

    def results(self, labels: Labels) -> Array:
        """The label of each output, shape (g, O)."""
        if not self.is_convolution:
            axes = labels[self.result]
            return np.broadcast_to(axes[-1], (self.groups, len(axes[-1])))
        return labels[self.result][1].reshape(self.groups, -1)

    def _output_shape(self, source: Tensor) -> list[int]:
        arguments = self.op.arguments
        return _output_shape(
            source.shape[2:], self.kernel, arguments["stride"], arguments["padding"], arguments["dilation"]
        )


Sizes = Sequence[int]


def _output_shape(sizes: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> list[int]:
    options = zip(sizes, kernel, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in options]


@lru_cache(maxsize=64)
def _patch_index(sizes: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Tensor:
    """Which pixels of the flattened, padded image each position reads, shape (positions, kernel size)."""
    index = torch.zeros(1, 1, dtype=torch.int64)
    for axis, size in enumerate(_output_shape(sizes, kernel, stride, padding, dilation)):
        starts, taps = torch.arange(size) * stride[axis], torch.arange(kernel[axis]) * dilation[axis]
        grid = starts[:, None] + taps
        index = index[:, None, :, None] * (sizes[axis] + 2 * padding[axis]) + grid[None, :, None, :]
        index = index.reshape(index.shape[0] * index.shape[1], -1)
    return index


def find_sites(trace: Trace) -> list[Site]:
    """All sites of the evaluation run, in order."""
    names = {ref.id: name for name, ref in trace.parameters.items()}
    makers = {ref.id: op for op in trace.evaluation for ref in op.outputs}
    uses: Counter[str] = Counter()
    sites = []
    for op in trace.evaluation:
        found = _weight_of(op)
        if found is None:
            continue
        argument, weight, bias = found
        views = _views(weight, makers, names)
        parameter = names.get(views[0].tensors[0].id if views else weight.id)
        if parameter is None:
            continue
        groups = _groups(op, weight)
        bias_name = names.get(bias.id) if isinstance(bias, TensorRef) and len(bias.shape) == 1 else None
        sites.append(Site(op, parameter, uses[parameter], argument, tuple(views), bias_name, groups))
        uses[parameter] += 1
    return sites


def _weight_of(op: Op) -> tuple[str, TensorRef, Any] | None:
    """Name of the activation's argument, the weight, and the bias of an operator that may be a site."""
    arguments, name = op.arguments, base_name(op)
    if name == "convolution":
        plain = not arguments["transposed"] and len(arguments["input"].shape) == len(arguments["weight"].shape)
        return ("input", arguments["weight"], arguments["bias"]) if plain else None
    if name in ("mm", "bmm"):
        return "self", arguments["mat2"], None
    if name == "addmm" and arguments["beta"] == arguments["alpha"] == 1:
        return "mat1", arguments["mat2"], arguments["self"]
    return None


def _groups(op: Op, weight: TensorRef) -> int:
    return op.arguments["groups"] if "groups" in op.arguments else weight.shape[0] if len(weight.shape) == 3 else 1


def _views(ref: TensorRef, makers: dict[int, Op], names: dict[int, str]) -> list[Op]:
    """The views that lead from a parameter to ``ref``; empty if it is one, or is computed in another way."""
    views: list[Op] = []
    while ref.id not in names and ref.id in makers:
        op = makers[ref.id]
        copies = base_name(op) == "expand" and op.outputs[0].shape != op.tensors[0].shape
        if not op.func.is_view or copies or len(op.tensors) != 1 or len(op.outputs) != 1:
            return []
        views.insert(0, op)
        ref = op.tensors[0]
    return views if ref.id in names else []


def by_key(sites: Iterable[Site]) -> dict[Key, Site]:
    """Sites by what names them."""
    return {site.key: site for site in sites}
