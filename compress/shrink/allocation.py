"""How much of one budget pruning spends, and what factorisation does with the rest.

A layer that reads removed channels is refitted by least squares to those that stay, and the refitted weights are
factorised. The second moments of the inputs that stay are part of those of all inputs, so that this takes no further
pass over the data. What a division costs is measured at the model's outputs on a few samples: removed channels change
so much that no first-order estimate tells it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from compress.budget import Budget
from compress.cost import Cost, relative_latency
from compress.errors import BudgetError
from compress.factorize.clock import timed, within_latency
from compress.factorize.factorizing import built
from compress.factorize.look import Look
from compress.factorize.means import keep_means
from compress.factorize.options import Layer
from compress.factorize.plan import FactorPlan
from compress.factorize.selection import Choice, within_budget
from compress.factorize.surgery import insert
from compress.factorize.targets import Targets
from compress.landing import Landing
from compress.plan import PrunePlan
from compress.pruning import PruneResult
from compress.recorder import Trace
from compress.recover.weights import Weights, tensors_of
from compress.shrink.narrow import narrow
from compress.sites import Site, by_key, find_sites
from compress.surgery import copied
from compress.trace import ExampleInputs, record
from compress.trial import Trial

INTERVALS = 4  # of the range, at whose ends one looks first
HALVINGS = 2  # of those beside the best


@dataclass(frozen=True)
class Candidate:
    """A model that was pruned, refitted and factorised to meet the budget.

    ``pruning`` is None where nothing was pruned. ``left`` says by parameter why a layer cannot be factorised. ``error``
    is that of the model's outputs on a few samples, as a part of their variance.
    """

    model: nn.Module
    pruning: PruneResult | None
    choice: Choice
    factors: FactorPlan
    left: Mapping[str, str]
    error: float

    @property
    def removed(self) -> PrunePlan:
        """The pruning's plan."""
        return PrunePlan.empty() if self.pruning is None else self.pruning.plan


def least(at: Callable[[float], Candidate], lowest: float, highest: float) -> Candidate:
    """The best of some candidates that prune down to fractions between both ends, found by halving around the best.

    Raises:
        BudgetError: none meets the budget; says what the closest can reach.
    """
    errors: dict[float, float] = {}
    best: list[Candidate] = []
    failed: list[BudgetError] = []

    def look(points: Sequence[float]) -> float:
        for point in (point for point in points if point not in errors):
            errors[point] = math.inf
            try:
                candidate = at(point)
            except BudgetError as error:
                failed.append(error)
                continue
            errors[point] = candidate.error
            best[:] = [min([*best, candidate], key=lambda each: each.error)]
        return min(errors, key=lambda point: errors[point])

    middle, step = look(np.linspace(lowest, highest, INTERVALS + 1).tolist()), (highest - lowest) / INTERVALS
    for _ in range(HALVINGS):
        step /= 2
        middle = look([point for point in (middle - step, middle + step) if lowest <= point <= highest])
    if not best:
        raise min(failed, key=lambda error: error.smallest or 1.0)
    return best[0]


class Allocation:
    """Turns prunings of ``dense`` into candidates that meet ``budget``.

    Args:
        look: at the dense model, at all sites that either method changes.
        before: the dense model's cost.
        trial: of the dense model.
        methods: of factorisation; none leaves all to pruning.
        protect: patterns of what is not factorised.
    """

    def __init__(
        self,
        dense: nn.Module,
        example_inputs: ExampleInputs,
        look: Look,
        before: Cost,
        budget: Budget,
        trial: Trial,
        *,
        methods: Sequence[str],
        protect: Sequence[str],
    ) -> None:
        self._dense, self._inputs, self._look = dense, example_inputs, look
        self._before, self._budget, self._trial = before, budget, trial
        self._methods, self._protect = methods, protect
        self._latencies: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()

    def kept(self, pruning: PruneResult | None) -> float:
        """What pruning leaves of the dense model's cost; latency is measured, once."""
        metric = self._budget.metric
        if pruning is None:
            return 1.0
        if metric != "latency":
            return float(getattr(pruning.after, metric) / getattr(self._before, metric))
        if pruning.model not in self._latencies:
            self._latencies[pruning.model] = relative_latency(pruning.model, self._dense, self._inputs)
        return self._latencies[pruning.model]

    def candidate(
        self, pruning: PruneResult | None, *, quickly: bool = True, choice: Choice | None = None
    ) -> Candidate:
        """What factorisation makes of a pruned model, or of the dense one; better if not ``quickly``.

        Args:
            choice: of ranks, as it was made before.

        Raises:
            BudgetError: too little can be saved; says what can be reached.
        """
        model = copied(self._dense if pruning is None else pruning.model)
        trace = record(model, self._inputs, training=False)
        look = self._look if pruning is None else self._refitted(model, trace, pruning.plan)
        factors, left, choice = FactorPlan(), dict[str, str](), choice or {}
        if self.kept(pruning) > self._budget.fraction:
            targets = Targets()
            if self._methods:
                targets = Targets.of(model, trace, self._methods, self._protect, self._inputs)
            layers, left = look.layers(model, targets, self._methods, refined=not quickly)
            if self._budget.metric == "latency":
                layers, slow = timed(model, layers, targets.shapes)
                left |= slow
            choice = choice or self._chosen(model, layers, pruning)
            factors, weights = built(layers, choice, self._budget.metric, quickly=quickly)
            insert(model, factors, weights)
            keep_means(model, layers, factors, look.grams)
        return Candidate(model, pruning, choice, factors, left, self._trial.error(model))

    def _chosen(self, model: nn.Module, layers: Sequence[Layer], pruning: PruneResult | None) -> Choice:
        metric, fraction, kept = self._budget.metric, self._budget.fraction, self.kept(pruning)
        try:
            if metric == "latency":
                if not any(layer.options for layer in layers):
                    raise BudgetError("no layer gets faster", smallest=kept)
                return within_latency(model, self._inputs, layers, fraction, self._dense)[0]
            present = getattr(self._before if pruning is None else pruning.after, metric)
            return within_budget(layers, metric, present, int(getattr(self._before, metric) * fraction) / present)
        except BudgetError as error:
            reached = (error.smallest or 1.0) * (1.0 if metric == "latency" else kept)
            raise BudgetError(
                f"shrinking brings {metric} down to {reached:.4g} of the model, not to {fraction:.4g}: allow more, or "
                "protect less",
                reached,
            ) from error

    def _refitted(self, model: nn.Module, trace: Trace, plan: PrunePlan) -> Look:
        """Refit what reads removed channels; what is known of the inputs that are left."""
        tensors, dense, sites = tensors_of(model), tensors_of(self._dense), by_key(find_sites(trace))
        stays = _stays(plan, dense)
        found = {}
        for key, known in self._look.grams.items():
            if key[0] not in stays:
                found[key] = known
                continue
            part, site = narrow(known, dense[key[0]].detach(), stays[key[0]]), sites.get(key)
            if part is None or site is None or part.sums.gram.shape[:2] != (site.groups, site.num_inputs + 1):
                continue  # a grouped convolution whose groups are not what they were
            found[key] = replace(part.sums, site=site)
            if key[1] == 0 and (key[0], 1) not in self._look.grams:  # else several uses share the weight
                _write(part.matrix, site, known.landing, tensors)
        columns = {name: stays[name].any(0) for name, _ in self._look.curvature if name in stays}
        curvature = {key: _of_columns(m, columns.get(key[0])) for key, m in self._look.curvature.items()}
        return replace(self._look, grams=found, curvature=curvature)


def _of_columns(matrix: Tensor, stays: Tensor | None) -> Tensor:
    """Those of a table's curvature (1, D, D) or (1, D)."""
    if stays is None:
        return matrix
    return matrix[:, stays] if matrix.dim() == 2 else matrix[:, stays][:, :, stays]


def _stays(plan: PrunePlan, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which elements of parameters that lose some are left."""
    masks: dict[str, Tensor] = {}
    for (name, axis), indices in plan.removed().items():
        mask = masks.setdefault(name, torch.ones(dense[name].shape, dtype=torch.bool))
        mask.index_fill_(axis, torch.from_numpy(indices), False)
    return masks


def _write(matrix: Tensor, site: Site, landing: Landing, tensors: Mapping[str, Tensor]) -> None:
    name, sign = landing.intercept or (None, 1)
    shift = None if name is None else tensors[name].detach()
    Weights(site, tensors[site.parameter].detach(), shift, sign, constant=False).write(matrix)
