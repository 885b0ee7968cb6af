"""One layer of the pruned model, refitted from all batches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.recover.pair import Pair
from compress.recover.regression import CAUTIOUS, RIDGES, Method, Regression, Rows
from compress.recover.targets import targets_of
from compress.recover.weights import Weights
from compress.sites import Key

LEAST_ROWS, LEAST_PER_INPUT = 32768, 8  # of one layer, where there are so many
ROWS_PER_INPUT = 192  # neighbouring positions are alike: fewer fit what these images have in common
MAX_VALUES = 2**26  # of the inputs of all rows: beyond, no more than the least


@dataclass(frozen=True)
class LayerError:
    """Squared error of what a layer gives, against the dense model, as a part of its variance, on held-out data.

    ``method`` says what was kept; empty where nothing helped.
    """

    name: str
    before: float
    after: float
    method: str
    scarce: bool = False


@dataclass(frozen=True)
class Layer:
    """A site of the pruned model in ``pairs``, which have stopped there, and what goes with it.

    ``kept`` are the outputs of the dense model's layer that the pruned one has; ``tensors`` are the pruned model's, by
    name; ``counts`` is what squared errors of each batch count, all alike if empty.
    """

    pairs: Sequence[Pair]
    key: Key
    lands: bool
    kept: Tensor
    tensors: Mapping[str, Tensor]
    generator: torch.Generator
    counts: Sequence[float] = ()

    @property
    def weights(self) -> Weights:
        """The parameters."""
        return Weights.of(self.pairs[0].small, self.key, self.tensors)

    def renew(self) -> None:
        """The runs go on with what the layer gives now."""
        for pair in self.pairs:
            pair.small.renew(self.key)

    def refit(self, allowed: Sequence[str]) -> LayerError:
        """Solve for the weights; what helps is written into the model, and the runs go on with it."""
        weights = self.weights
        site = weights.site
        total = sum(pair.small.sites[self.key].num_rows(pair.small.source(self.key)) for pair in self.pairs)
        share = min(1.0, _num_rows(site.num_inputs) / max(total, 1))
        rows = [self._rows(pair, share, weights.shift if weights.constant else None) for pair in self.pairs]
        rows = [part.counting(count) for part, count in zip(rows, self.counts, strict=True)] if self.counts else rows
        free = weights.shift is not None
        regression = Regression(site.matrix(weights.weight).double().cpu(), rows, free=free)
        least = CAUTIOUS if regression.scarce else 0.0
        methods = [Method()] if free and "bias" in allowed else []
        methods += [Method(ridge) for ridge in RIDGES if ridge >= least] if "least_squares" in allowed else []
        matrix, method, before, after = regression.best(methods)
        if method is not None:
            weights.write(matrix)
        self.renew()
        name = site.parameter.removesuffix(".weight")
        return LayerError(name, before, after, "" if method is None else str(method), regression.scarce)

    def _rows(self, pair: Pair, share: float, constant: Tensor | None) -> Rows:
        """What enters the site of the pruned model, and what it should give."""
        small = pair.small
        site, source = small.sites[self.key], small.source(self.key)
        positions = site.positions(source, math.ceil(site.num_rows(source) * share), self.generator)
        targets = targets_of(pair, self.key, self.lands, self.kept, positions)
        if constant is not None:
            targets = targets.without(constant.detach().reshape(site.groups, 1, -1))
        return Rows.of(site.rows(source, positions), targets)


def _num_rows(num_inputs: int) -> int:
    many = min(ROWS_PER_INPUT * num_inputs, MAX_VALUES // num_inputs)
    return max(LEAST_ROWS, LEAST_PER_INPUT * num_inputs, many)
