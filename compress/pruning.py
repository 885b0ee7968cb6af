"""Prune a model to a budget: trace, score, select, cut, verify, recover."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from compress.budget import Budget
from compress.calibration import Calibration, batches, check_calibration
from compress.channels import ChannelGraph, trace
from compress.cost import Cost, CostModel, cost_of, latencies
from compress.criteria import Criterion, needs, resolve
from compress.errors import PruneError
from compress.evidence import Evidence, Values, collect_activations
from compress.gram import collect_grams
from compress.labels import Array
from compress.plan import PrunePlan, make_plan
from compress.recover import Recovery, methods_of
from compress.recover import recover as recovered
from compress.removal import Removal, by_score
from compress.sandbox import on_meta, unwrapped
from compress.select import Selection, SelectOptions, select
from compress.surgery import apply
from compress.trace import ExampleInputs, record
from compress.trial import Trial, first_samples
from compress.verify import agrees, check_repeatable, culprits


@dataclass(frozen=True)
class PruneResult:
    """A pruned model and how it came about.

    ``kept`` gives (kept, total) output channels by layer, ``scores`` the scores of all units by group before pruning,
    ``notes`` what a user should know (groups that were frozen because their removal did not verify, say), ``recovery``
    what was won back without training.
    """

    model: nn.Module
    plan: PrunePlan
    before: Cost
    after: Cost
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    scores: Mapping[str, Values] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    recovery: Recovery | None = None

    def summary(self) -> str:
        """Before and after as a table, with what is left of each layer."""
        from compress.table import result_table

        return result_table(self)


def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    budget: Budget,
    criterion: str | Criterion = "l2",
    scope: str = "global",
    calibration: Calibration | None = None,
    loss: Callable[..., Any] | None = None,
    recover: bool | Sequence[str] = False,
    exact_only: bool = False,
    protect: Sequence[str] = (),
    round_to: int = 1,
    min_channels: int = 1,
    seed: int = 0,
) -> PruneResult:
    """Remove the least important channels of ``model`` until it meets ``budget``. The model itself is not changed.

    Args:
        model: any module, in any mode.
        example_inputs: what it is called with: a tensor, a tuple of arguments, or a dict of keyword arguments.
        budget: the fraction to keep of channels, params, macs or latency; met exactly, by the last possible channel.
        criterion: a name from :data:`compress.criteria.CRITERIA`, or a callable ``(group, evidence) -> scores``.
        scope: "global" compares channels over the whole model, "uniform" takes the same part of every group.
        calibration: batches for criteria that look at activations, and for ``recover``; a DataLoader will do.
        loss: what criteria that need targets minimise; handed to the criterion in its evidence.
        recover: repair the pruned model from ``calibration`` alone, without labels or training: True, or names from
            :data:`compress.recover.METHODS`; each is kept where it helps on held-out data.
        exact_only: remove only what can be removed exactly (see :attr:`PrunePlan.exact`).
        protect: shell patterns of parameter or module names that must stay whole, such as ``"head.*"``.
        round_to: widths become multiples of this number.
        min_channels: no axis gets shorter than this.
        seed: for criteria that draw random numbers.

    Raises:
        TraceError: the model does not run on its example inputs.
        BudgetError: the budget cannot be reached; says what can.
        CalibrationError: data are needed and missing, or do not fit.
        PruneError: nothing can be pruned (the reasons are listed), the output is random, or an option is unknown.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> result = prune(model, torch.zeros(1, 8), budget=Budget(macs=0.5))
    >>> result.before.macs, result.after.macs, result.plan.exact
    (192, 96, True)
    """
    model = unwrapped(model)
    score = resolve(criterion)
    options = SelectOptions(scope, round_to, min_channels, exact_steps=budget.metric != "latency")
    methods = methods_of(recover)
    if methods:
        calibration = check_calibration(calibration, f"recover={recover!r}")
    if needs(score):
        calibration = check_calibration(calibration, f"criterion {criterion!r}")
    graph = trace(model, example_inputs).protecting(protect)
    graph = graph.exactly() if exact_only else graph
    evidence = Evidence(model, graph, loss=loss, seed=seed)
    if "activations" in needs(score) and calibration is not None:
        evidence = replace(evidence, activations=collect_activations(model, graph, calibration))
    if "grams" in needs(score) and calibration is not None:
        evidence = replace(evidence, **_grams(model, graph, calibration, seed))
    notes = list(graph.trace.notes)
    if on_meta(model):
        notes.append("not verified: the model is on the meta device and has no values")
    while True:
        removals, scores = _removals(score, replace(evidence, graph=graph))
        attempt = _Attempt(model, example_inputs, graph)
        selection = select(graph, removals, attempt.price(budget), attempt.cost(budget), budget.fraction, options)
        failed = [] if on_meta(model) else attempt.failing_lumps(selection)
        if not failed:
            break
        check_repeatable(model, example_inputs, graph.trace)
        names = sorted({graph.groups[g].name for index in failed for g in graph.lumps[index].units})
        notes.append(f"kept whole, as removal did not verify: {', '.join(names)}")
        graph = graph.without(_of_their_kind(graph, failed), "its removal did not verify")
    pruned, plan = attempt.pruned(selection)
    recovery = None
    if methods and calibration is not None and plan.groups:
        recovery = recovered(pruned, model, plan, calibration, methods, seed=seed)
        notes += recovery.notes
    after = cost_of(pruned, record(pruned, example_inputs, training=False))
    if graph.trace.real:  # another number of proposals, say, would be counted: price what the dense model ran
        after = replace(after, macs=round(attempt.cost(Budget(macs=1.0))(selection) * attempt.before.macs))
    named = {f"{group.name}#{group.index}": values for group, values in zip(graph.groups, scores, strict=True)}
    return PruneResult(pruned, plan, attempt.before, after, _kept(graph, plan), named, tuple(notes), recovery)


class _Attempt:
    """One channel graph being pruned: builds plans from selections, prices them, and checks them."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, graph: ChannelGraph) -> None:
        if not len(graph.sizes):
            reasons = list(dict.fromkeys(str(axis) for axis in graph.frozen))
            raise PruneError("nothing can be pruned: " + "; ".join(reasons[:6]) + ("; ..." if len(reasons) > 6 else ""))
        self.model, self.inputs, self.graph = model, example_inputs, graph
        self.before = cost_of(model, graph.trace)
        self._built: dict[tuple[tuple[int, int], ...], tuple[nn.Module, PrunePlan]] = {}

    def cost(self, budget: Budget) -> Callable[[Selection], float]:
        """The part of the dense model's cost that remains after a selection."""
        if budget.metric == "latency":
            return self._latency
        remaining = self._remaining(budget.metric)
        sizes = self.graph.sizes

        def after(selection: Selection) -> float:
            kept = sizes.copy()
            for group, units in selection.units.items():
                kept[group] -= len(units)
            return remaining(kept)

        return after

    def price(self, budget: Budget) -> Callable[[Array], float]:
        """What remains of the dense model's cost with so many units kept; MACs stand in for seconds."""
        return self._remaining("macs" if budget.metric == "latency" else budget.metric)

    def _remaining(self, metric: str) -> Callable[[Array], float]:
        if metric == "channels":
            return lambda kept: float(kept.sum() / self.graph.sizes.sum())
        total = self.before.macs if metric == "macs" else self.before.params
        price = CostModel(self.graph, metric, total)
        return lambda kept: price(kept) / max(total, 1)

    def pruned(self, selection: Selection) -> tuple[nn.Module, PrunePlan]:
        """The pruned copy of the model, and its plan."""
        key = tuple(sorted(selection.lumps.items()))
        if key not in self._built:
            self._built.clear()  # one at a time: models are large
            plan = self.plan(selection)
            self._built[key] = apply(self.model, plan), plan
        return self._built[key]

    def plan(self, selection: Selection) -> PrunePlan:
        """The plan for a selection."""
        return make_plan(self.graph, selection.units, self.graph.stored_after(selection.lumps))

    def failing_lumps(self, selection: Selection) -> list[int]:
        """Lumps of the selection whose removal breaks the model; none if all is well."""
        lumps = list(selection.lumps)
        exact = [i for i in lumps if all(self.graph.groups[g].exact for g in self.graph.lumps[i].units)]
        for parts in (lumps, exact) if len(exact) < len(lumps) else (lumps,):
            # inexact parts can only be run; what is exact is compared by numbers as well
            if parts and not self._holds(selection, parts):
                return culprits(parts, lambda some: self._holds(selection, some))
        return []

    def _holds(self, selection: Selection, lumps: Sequence[int]) -> bool:
        part = _restricted(self.graph, selection, lumps)
        try:
            pruned, plan = self.pruned(part)
        except PruneError:
            return False
        return agrees(self.model, plan, pruned, self.inputs)

    def _latency(self, selection: Selection) -> float:
        pruned, _ = self.pruned(selection)
        dense, small = latencies([self.model, pruned], self.inputs)
        return small / dense


TRIAL_PASSES = 3  # passes over the calibration data that trying out all groups may cost


def _grams(model: nn.Module, graph: ChannelGraph, calibration: Calibration, seed: int) -> dict[str, Any]:
    """Evidence for criteria that know what a removal does to consumers, and ask what that does to the outputs."""
    grams = collect_grams(model, graph, calibration, seed=seed)
    number = max(TRIAL_PASSES * grams.num_samples // max(len(graph.sizes), 1), 16)
    inputs = first_samples((inputs for inputs, _ in batches(calibration, model)), min(number, grams.num_samples))
    return {"grams": grams, "trial": Trial(model, inputs)}


def _removals(criterion: Criterion, evidence: Evidence) -> tuple[list[Removal], list[Values]]:
    """In which order each group's units go and what that loses, and a score for each unit."""
    removals, scores = [], []
    for group in evidence.graph.groups:
        found = criterion(group, evidence)
        values = found.scores if isinstance(found, Removal) else np.asarray(found, dtype=np.float64)
        if values.shape != (group.num_units,):
            raise PruneError(
                f"the criterion gave scores of shape {values.shape} for group {group.name!r}, which has "
                f"{group.num_units} units: return one score a unit"
            )
        if not np.isfinite(values).all():
            raise PruneError(
                f"the criterion gave scores that are not finite for group {group.name!r}: check the weights"
            )
        removals.append(found if isinstance(found, Removal) else by_score(group, values))
        scores.append(values)
    return removals, scores


def _restricted(graph: ChannelGraph, selection: Selection, lumps: Sequence[int]) -> Selection:
    """The part of a selection that some lumps make: of a group that several lumps share, the first units."""
    if len(lumps) == len(selection.lumps):
        return selection
    counts: dict[int, int] = {}
    for index in lumps:
        for group, number in graph.lumps[index].units.items():
            counts[group] = counts.get(group, 0) + number * selection.lumps[index]
    units = {group: selection.units[group][:count] for group, count in counts.items()}
    return Selection(units, {index: selection.lumps[index] for index in lumps})


def _of_their_kind(graph: ChannelGraph, lumps: Sequence[int]) -> list[Any]:
    """The groups of the failing lumps, and all groups whose layers are of the same kind: they would fail alike."""
    kinds = {_kind(graph, g) for index in lumps for g in graph.lumps[index].units}
    return [group for group in graph.groups if _kind(graph, group.index) in kinds]


def _kind(graph: ChannelGraph, group: int) -> tuple[tuple[str, int, str], ...]:
    found = graph.groups[group]
    names = {(".".join(p for p in m.parameter.split(".") if not p.isdigit()), m.axis, m.role) for m in found.members}
    # names that are numbers alone (layers of a Sequential) say nothing about kind: such a group is of its own
    return (*sorted(names), *([("", group, "")] if any("." not in name for name, _, _ in names) else []))


def _kept(graph: ChannelGraph, plan: PrunePlan) -> dict[str, tuple[int, int]]:
    removed = plan.removed()
    kept: dict[str, tuple[int, int]] = {}
    for group in graph.groups:
        for member in group.members:
            if member.role == "producer":
                gone = len(removed.get((member.parameter, member.axis), ()))
                kept[member.parameter.removesuffix(".weight")] = (member.size - gone, member.size)
    return kept
