"""Refit a layer for what another layer makes of it: two layers and a nonlinearity between them, by Gauss-Newton steps.

Least squares for one layer at a time keeps the first layer of a block at the dense model's channels, although nothing
but the second reads them. Here the first takes a step towards what the second needs, and the second is refitted, in
turn. The step is Gauss-Newton with a Kronecker-factored curvature (Martens & Grosse 2015, "Optimizing neural networks
with Kronecker-factored approximate curvature", section 3): second moments of the inputs on one side, on the other how
the second layer's outputs respond to each channel.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compress.gram import add_product, with_ones
from compress.recover.layer import Layer, LayerError
from compress.recover.pair import Pair
from compress.recover.targets import Targets, targets_of
from compress.recover.weights import Weights

ROUNDS = 2
STEP_ROWS = 65536  # of the second layer, about: whole batches are used, two at least
INPUT_DAMPING, OUTPUT_DAMPING = 1e-3, 1e-2  # of the mean of each factor's diagonal
SCALES = (0.5, 1.0)  # where the error along the step is measured


def refit_chain(second: Layer, error: LayerError, methods: Sequence[str]) -> LayerError:
    """Refit ``second``, which was refitted to ``error``, together with the layer that feeds it.

    What did not lower the error is undone.
    """
    for _ in range(ROUNDS):
        step = _Step(second)
        before, drawn = second.weights.values(), second.generator.get_state()
        if not step.take():
            break
        again = second.refit(methods)
        if _worse(again, error):
            step.undo()
            second.weights.restore(before)
            second.renew()
            second.generator.set_state(drawn)
            break
        error = replace(again, before=error.before, method=f"{again.method or error.method}, with {step.name}")
    return error


class _Step:
    """A step for the layer that feeds ``second``."""

    def __init__(self, second: Layer) -> None:
        self._layer = second
        side = second.pairs[0].small
        self._keys = side.chains[second.key].first, second.key
        self._site, self._next = (side.sites[key] for key in self._keys)
        self._weights = Weights.of(side, self._keys[0], second.tensors)
        self._start = self._weights.values()
        per_batch = self._next.num_rows(side.source(second.key))
        number = max(2, math.ceil(STEP_ROWS / max(per_batch, 1)))
        self._used = [(pair, targets_of(pair, second.key, second.lands, second.kept)) for pair in second.pairs[:number]]
        self.name = self._site.parameter.removesuffix(".weight")

    def take(self) -> bool:
        """Take the step as far as it helps on held-out batches; False where it does not help at all."""
        held = self._used[-1:]
        direction = self._direction(self._used[:-1] or self._used)
        if direction is None:
            return False
        before = self._error(held)
        errors = []
        for scale in SCALES:
            self._move(direction, scale)
            errors.append(self._error(held))
        best = _lowest(before, dict(zip(SCALES, errors, strict=True)))
        self._move(direction, best)
        if best > 0 and self._error(held) < before:
            self._pass_on()
            return True
        self._weights.restore(self._start)
        return False

    def undo(self) -> None:
        """As before the step."""
        self._weights.restore(self._start)
        self._pass_on()

    def _pass_on(self) -> None:
        for pair in self._layer.pairs:
            pair.small.source(self._keys[1]).copy_(self._entering(pair))

    def _entering(self, pair: Pair) -> Tensor:
        """What the second layer reads with the first one's present weights."""
        return pair.small.follow(self._keys[1], pair.small.output(self._keys[0]))

    def _direction(self, used: Sequence[tuple[Pair, Targets]]) -> Tensor | None:
        """The change of the first layer's matrix, with a column for the constants: (g, O, D + 1)."""
        site = self._site
        size = site.num_inputs + 1
        gram = torch.zeros(site.groups, size, size, dtype=torch.float64)
        cross = torch.zeros(site.groups, size, site.num_outputs, dtype=torch.float64)
        passed = torch.zeros(site.groups, site.num_outputs, site.num_outputs, dtype=torch.float64)
        importance = torch.zeros(self._next.groups, self._next.num_outputs, dtype=torch.float64)
        number = 0
        for pair, targets in used:
            downhill, slope = self._gradient(pair, targets)
            rows = with_ones(site.rows(pair.small.source(self._keys[0]), None))
            add_product(gram, rows, rows)
            add_product(cross, rows, downhill.to(rows))
            add_product(passed, slope, slope)
            importance += targets.weight.double().sum(1).cpu()
            number += rows.shape[1]
        response = self._response(importance / number, site.groups * site.num_outputs)
        free = size if self._weights.shift is not None else size - 1
        curvature = passed / number * response
        inputs = _solved(gram[:, :free, :free] / number, cross[:, :free] / number, INPUT_DAMPING)
        both = None if inputs is None else _solved(curvature, inputs.mT, OUTPUT_DAMPING)
        if both is None:
            return None
        return torch.cat([both, both.new_zeros(*both.shape[:2], size - free)], dim=2)

    def _gradient(self, pair: Pair, targets: Targets) -> tuple[Tensor, Tensor]:
        """Downhill at the first layer's outputs, and the slope of what is between the layers, (g, R, O) both."""
        small, (first, second) = pair.small, self._keys
        with torch.enable_grad():
            given = small.output(first).detach().requires_grad_()
            entering = small.follow(second, given.clone())
            slope = torch.autograd.grad(entering.sum(), given, retain_graph=True)[0]
            error = targets.error(self._next.outputs(small.output(second, entering), None)) / 2
            downhill = -torch.autograd.grad(error, given)[0]
        return self._site.outputs(downhill, None), self._site.outputs(slope, None)

    def _response(self, importance: Tensor, channels: int) -> Tensor:
        """How alike the second layer's outputs respond to channels of the first: (g, O, O), of the first's groups."""
        matrix = self._next.matrix(self._layer.weights.weight).double().cpu()
        groups, outputs, inputs = matrix.shape
        whole = torch.zeros(channels, channels, dtype=torch.float64)
        each = channels // groups if self._next.is_convolution else channels
        split = matrix.reshape(groups, outputs, each, inputs // each)
        own = torch.einsum("go,goit,gojt->gij", importance.reshape(groups, outputs), split, split)
        if each == channels:
            whole += own.sum(0)
        else:
            whole = torch.block_diag(*own)
        mine = channels // self._site.groups
        return torch.stack([block[:, i * mine : (i + 1) * mine] for i, block in enumerate(whole.split(mine))])

    def _move(self, direction: Tensor, scale: float) -> None:
        self._weights.restore(self._start)
        change = direction * scale
        change[:, :, :-1] += self._site.matrix(self._weights.weight).double().cpu()
        self._weights.write(change)

    def _error(self, used: Sequence[tuple[Pair, Targets]]) -> float:
        total = 0.0
        for pair, targets in used:
            found = pair.small.output(self._keys[1], self._entering(pair))
            total += float(targets.error(self._next.outputs(found, None)))
        return total


def _solved(matrix: Tensor, right: Tensor, damping: float) -> Tensor | None:
    """Damped solution of (g, D, D) and (g, D, K); None where it is singular."""
    level = damping * matrix.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    factor, failed = torch.linalg.cholesky_ex(
        matrix + level[:, None, None] * torch.eye(matrix.shape[1], dtype=matrix.dtype)
    )
    return None if bool(failed.any()) else torch.cholesky_solve(right, factor)


def _lowest(start: float, errors: Mapping[float, float]) -> float:
    """The scale where a parabola through the errors at 0 and at two scales is lowest; 0 where that is nowhere."""
    (a, at_a), (b, at_b) = errors.items()
    curve = ((at_b - start) / b - (at_a - start) / a) / (b - a)
    slope = (at_a - start) / a - curve * a
    if curve <= 0:
        return min((error, scale) for scale, error in {0.0: start, **errors}.items())[1]
    return min(max(-slope / (2 * curve), 0.0), 2.0)


def _worse(again: LayerError, error: LayerError) -> bool:
    return again.after >= error.after
