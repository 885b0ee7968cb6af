"""Embeddings as a thin table and a dense layer: what is lost counts as often as the tokens occur.

Row v of a table T (V, D) is an output by itself, so the squared error on calibration data is the sum over tokens of
their frequency times the error of their row: the truncated SVD of T with rows scaled by the root of the frequencies is
the best (Chen et al. 2018, "GroupReduce", equation 3, with one group).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from compress.curvature import diagonal
from compress.errors import PruneError
from compress.recorder import Op, Trace
from compress.rules.registry import base_name
from compress.trace import ExampleInputs
from compress.uses import Uses
from compress.watch import Looks
from layers.low_rank import LowRankEmbedding

UNSEEN = 0.5  # occurrences that every token has more than were seen (Krichevsky & Trofimov 1981): none may be lost


@dataclass(frozen=True)
class Table:
    """A table (V, D), how often each token occurs (V,), of all tokens, and what an error of an output counts."""

    weight: Tensor
    frequency: Tensor
    importance: float

    @staticmethod
    def of(weight: Tensor, counts: Tensor | None = None, curvature: Tensor | None = None) -> "Table":
        """In double precision; tokens are alike where none were counted.

        Args:
            curvature: what errors cost the model's outputs (1, D, D), see :mod:`compress.curvature`; of this the mean
                over all directions is used. Else errors are parts of the variance of the table's own outputs.

        Raises:
            PruneError: numbers are not finite.
        """
        weight = weight.detach().double().cpu()
        if not bool(weight.isfinite().all()):
            raise PruneError("the table must be finite")
        counts = weight.new_zeros(len(weight)) if counts is None else counts.double().cpu()
        frequency = (counts + UNSEEN) / (counts + UNSEEN).sum()
        variance = float(frequency @ (weight - frequency @ weight).square().sum(1))
        if curvature is not None:
            return Table(weight, frequency, float(diagonal(curvature).mean()))
        return Table(weight, frequency, 1 / variance if variance > 0 else 1.0)

    def full_rank(self) -> int:
        """From this rank on nothing is lost."""
        return min(self.weight.shape)

    @property
    def total(self) -> float:
        """The error of giving nothing at all."""
        return float(self.errors[0])

    @cached_property
    def errors(self) -> Tensor:
        """(R + 1,) for each rank."""
        tails = self._spectrum[0].flip(0).cumsum(0).flip(0)
        return torch.cat([tails, tails.new_zeros(1)])[: self.full_rank() + 1] * self.importance

    def factors(self, rank: int) -> tuple[tuple[Tensor, Tensor], float]:
        """The thin table (V, r) and the weight (D, r) of the layer behind it, and the error that is left.

        Raises:
            PruneError: the rank is below 1 or above the table's.
        """
        if not 1 <= rank <= self.full_rank():
            raise PruneError(f"rank {rank} is not between 1 and {self.full_rank()}, the rank of the whole table")
        basis = self._spectrum[1][:, :rank]
        return (self.weight @ basis, basis), float(self.errors[rank])

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Squared singular values, falling, and right singular vectors (D, R) of the weighted table."""
        _, values, right = torch.linalg.svd(self.weight * self.frequency.sqrt()[:, None], full_matrices=False)
        return values.square(), right.T


class TokenCounter:
    """Counts tokens by table: a :class:`compress.watch.Collector`."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = set(names)
        self._counts: dict[str, Tensor] = {}

    def watch(self, trace: Trace, looks: Looks) -> None:
        """Look at what each table is asked for."""
        for name, op in _lookups(trace).items():
            if name in self._names:
                looks.add_after(op.index, self._look(name))

    def begin(self, batch: int, inputs: ExampleInputs) -> None:
        """Nothing to prepare."""

    def result(self) -> Mapping[str, Tensor]:
        """How often each token was asked for, by table."""
        return self._counts

    def _look(self, name: str) -> Any:
        def look(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
            found = torch.bincount(args[1].flatten(), minlength=len(args[0])).cpu()
            self._counts[name] = self._counts.get(name, 0) + found

        return look


def find_tables(model: nn.Module, trace: Trace) -> tuple[dict[str, Op], dict[str, str]]:
    """The embeddings that can be replaced, by parameter, and why others cannot."""
    modules, uses, found, reasons = dict(model.named_modules()), Uses(trace), {}, {}
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
    for name, op in _lookups(trace).items():
        path, _, slot = name.rpartition(".")
        owner = modules.get(path)
        if type(owner) is not nn.Embedding or slot != "weight" or op.module != path or not path:
            reasons[name] = "it is a table that is not read through the call of an nn.Embedding"
        elif isinstance(modules[path.rpartition(".")[0]], LowRankEmbedding):
            reasons[name] = "it is a thin layer already: prune it, or factorise the dense model anew"
        elif owner.max_norm is not None or owner.scale_grad_by_freq or owner.sparse:
            reasons[name] = "its rows are renormalised, or have gradients of another kind"
        elif owners[id(owner.weight)] > 1:
            reasons[name] = "its weight is shared with another module"
        elif len(uses.of(trace.parameters[name].id)) > 1:
            reasons[name] = "its weight is used more than once"
        elif owner._forward_hooks or owner._forward_pre_hooks:
            reasons[name] = "its module has hooks, which the thin layers would not call"
        else:
            found[name] = op
    return found, reasons


def price(op: Op, rank: int | None = None) -> tuple[int, int]:
    """MACs and weights of a table, or of a thin one and the layer behind it."""
    tokens, (rows, columns) = math.prod(op.outputs[0].shape[:-1]), op.arguments["weight"].shape
    return (0, rows * columns) if rank is None else (tokens * rank * columns, rank * (rows + columns))


def _lookups(trace: Trace) -> dict[str, Op]:
    names = {ref.id: name for name, ref in trace.parameters.items()}
    return {
        names[op.arguments["weight"].id]: op
        for op in trace.evaluation
        if base_name(op) == "embedding" and op.arguments["weight"].id in names
    }
