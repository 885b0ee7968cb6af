"""Prune a model to a budget: trace, score, select, cut, verify, recover."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from compress.budget import Budget
from compress.calibration import Calibration, check_calibration
from compress.channels import ChannelGraph, trace
from compress.cost import Cost, CostModel, cost_of, relative_latency
from compress.criteria import Criterion, needs, resolve
from compress.errors import BudgetError, PruneError
from compress.evidence import Evidence, Values, collect_activations
from compress.gradients import collect_gradients
from compress.labels import Array
from compress.plan import PrunePlan, make_plan
from compress.recover import reestimate_batch_norm
from compress.sandbox import on_meta, unwrapped
from compress.select import FLOOR, Selection, SelectOptions, select
from compress.speed import meet_latency
from compress.surgery import apply, move_optimizer
from compress.timing import TimeTable, good_multiples
from compress.trace import ExampleInputs, record
from compress.verify import agrees, check_repeatable, culprits


@dataclass(frozen=True)
class PruneResult:
    """A pruned model and how it came about.

    ``kept`` gives (kept, total) output channels by layer, ``scores`` the scores of all units by group before pruning,
    ``notes`` what a user should know (groups that were frozen because their removal did not verify, say).
    """

    model: nn.Module
    plan: PrunePlan
    before: Cost
    after: Cost
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    scores: Mapping[str, Values] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
    recover: bool = False,
    exact_only: bool = False,
    protect: Sequence[str] = (),
    round_to: int | str = 1,
    min_channels: int = 1,
    seed: int = 0,
    optimizer: Optimizer | None = None,
) -> PruneResult:
    """Remove the least important channels of ``model`` until it meets ``budget``. The model itself is not changed.

    Args:
        model: any module, in any mode.
        example_inputs: what it is called with: a tensor, a tuple of arguments, or a dict of keyword arguments.
        budget: the fraction to keep of channels, params, macs or latency; met exactly, by the last possible channel.
        criterion: a name from :data:`compress.criteria.CRITERIA`, or a callable ``(group, evidence) -> scores``.
        scope: "global" compares channels over the whole model, "uniform" takes the same part of every group.
        calibration: batches for criteria that look at data, and for ``recover``; a DataLoader will do.
        loss: ``loss(output, target)`` for criteria that need gradients, cross-entropy on class indices if None.
        recover: re-estimate batch-norm statistics on ``calibration`` afterwards.
        exact_only: remove only what can be removed exactly (see :attr:`PrunePlan.exact`).
        protect: shell patterns of parameter or module names that must stay whole, such as ``"head.*"``.
        round_to: widths become multiples of this number; "auto" times which multiples are worth it on this machine,
            layer by layer, as a latency budget always does.
        min_channels: no axis gets shorter than this.
        seed: for criteria that draw random numbers.
        optimizer: that of ``model``: it is changed to train the pruned model, with its state cut alike.

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
    options = SelectOptions(scope, 1 if round_to == "auto" else round_to, min_channels)  # type: ignore[arg-type]
    timed = round_to == "auto" or budget.metric == "latency"
    if timed and on_meta(model):
        raise PruneError("a model on the meta device takes no time: give round_to=8 and another budget than latency")
    if recover:
        calibration = check_calibration(calibration, "recover=True")
    graph = trace(model, example_inputs).protecting(protect)
    graph = graph.exactly() if exact_only else graph
    evidence = collect_evidence(model, graph, [score], calibration, loss, seed)
    notes = list(graph.trace.notes)
    if on_meta(model):
        notes.append("not verified: the model is on the meta device and has no values")
    while True:
        scores = scores_of(score, replace(evidence, graph=graph))
        attempt = _Attempt(model, example_inputs, graph)
        selection = attempt.timed(scores, budget, options) if timed else attempt.select(scores, budget, options)
        failed = [] if on_meta(model) else attempt.failing_lumps(selection)
        if not failed:
            break
        check_repeatable(model, example_inputs, graph.trace)
        names = sorted({graph.groups[g].name for index in failed for g in graph.lumps[index].units})
        notes.append(f"kept whole, as removal did not verify: {', '.join(names)}")
        graph = graph.without(_of_their_kind(graph, failed), "its removal did not verify")
    if selection.floor < FLOOR:
        notes.append(f"the budget needed axes of down to {selection.floor:.0%} of their length (usually {FLOOR:.0%})")
    notes += attempt.notes
    pruned, plan = attempt.pruned(selection)
    if optimizer is not None:
        move_optimizer(optimizer, model, pruned, plan)
    if recover and calibration is not None:
        reestimate_batch_norm(pruned, calibration)
    after = cost_of(pruned, record(pruned, example_inputs, training=False))
    if graph.trace.real:  # another number of proposals, say, would be counted: price what the dense model ran
        after = replace(after, macs=round(attempt.cost(Budget(macs=1.0))(selection) * attempt.before.macs))
    named = {f"{group.name}#{group.index}": values for group, values in zip(graph.groups, scores, strict=True)}
    return PruneResult(pruned, plan, attempt.before, after, _kept(graph, plan), named, tuple(notes))


class _Attempt:
    """One channel graph being pruned: builds plans from selections, prices them, and checks them."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, graph: ChannelGraph) -> None:
        if not len(graph.sizes):
            reasons = list(dict.fromkeys(str(axis) for axis in graph.frozen))
            raise PruneError("nothing can be pruned: " + "; ".join(reasons[:6]) + ("; ..." if len(reasons) > 6 else ""))
        self.model, self.inputs, self.graph = model, example_inputs, graph
        self.before = cost_of(model, graph.trace)
        self.notes: list[str] = []
        self._built: dict[tuple[tuple[int, int], ...], tuple[nn.Module, PrunePlan]] = {}

    def cost(self, budget: Budget) -> Callable[[Selection], float]:
        """The part of the dense model's cost that remains after a selection."""
        remaining = self._remaining(budget.metric)
        sizes = self.graph.sizes

        def after(selection: Selection) -> float:
            kept = sizes.copy()
            for group, units in selection.units.items():
                kept[group] -= len(units)
            return remaining(kept)

        return after

    def savings(self, budget: Budget) -> list[float]:
        """What each lump saves if it goes first; of seconds, which fall in steps, the mean over half of the lumps."""
        remaining = self._remaining(budget.metric)
        saved = []
        for lump in self.graph.lumps:
            groups, units = list(lump.units), np.array(list(lump.units.values()))
            times = int((self.graph.sizes[groups] // units).min() + 1) // 2 if budget.metric == "latency" else 1
            kept = self.graph.sizes.copy()
            kept[groups] -= times * units
            saved.append((1.0 - remaining(kept)) / times)
        return saved

    def select(self, scores: Sequence[Values], budget: Budget, options: SelectOptions) -> Selection:
        """What goes so that the cost, predicted where it is latency, meets the budget."""
        return select(self.graph, scores, self.savings(budget), self.cost(budget), budget.fraction, options)

    def timed(self, scores: Sequence[Values], budget: Budget, options: SelectOptions) -> Selection:
        """The same with widths that are worth it on this machine, a measured latency, and nothing slower than dense."""
        if budget.fraction >= 1:
            return self.select(scores, budget, options)
        if options.round_to == 1:
            options = replace(options, multiples=good_multiples(self.graph, self.times))
        refused: list[BudgetError] = []
        while True:
            try:
                if budget.metric != "latency":
                    return self._no_slower(scores, budget, options)
                return meet_latency(
                    lambda aim, options=options: self.select(scores, Budget(latency=min(aim, 1.0)), options),  # type: ignore[misc]
                    self.latency,
                    budget.fraction,
                )
            except BudgetError as error:  # what is out of reach in good steps may not be in finer ones
                refused.append(error)
                finer = {index: multiple // 2 for index, multiple in options.multiples.items()}
                if not any(finer.values()):
                    raise min(refused, key=lambda found: found.smallest or np.inf) from None
                options = replace(options, multiples={index: max(1, multiple) for index, multiple in finer.items()})

    def _no_slower(self, scores: Sequence[Values], budget: Budget, options: SelectOptions) -> Selection:
        """Coarser multiples until the result is measured no slower than the dense model."""
        found: list[tuple[float, Selection]] = []
        for factor in (1, 2, 4, 8):
            coarser = {index: factor * multiple for index, multiple in options.multiples.items()}
            try:
                selection = self.select(scores, budget, replace(options, multiples=coarser))
            except BudgetError:
                if not found:
                    raise
                break
            found.append((self.latency(selection), selection))
            if found[-1][0] <= 1:
                break
        ratio, selection = min(found, key=lambda item: item[0])
        if ratio > 1:
            self.notes.append(f"takes {ratio:.2f} x the dense model's seconds: no widths were found that save any")
        return selection

    @cached_property
    def times(self) -> TimeTable:
        """Seconds of the model's operators by width."""
        return TimeTable(self.graph, self.model)

    def _remaining(self, metric: str) -> Callable[[Array], float]:
        if metric == "channels":
            return lambda kept: float(kept.sum() / self.graph.sizes.sum())
        if metric == "latency":
            seconds = self.times(self.graph.sizes)
            return lambda kept: self.times(kept) / seconds
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
        for parts in (exact, lumps) if len(exact) < len(lumps) else (lumps,):
            # what is exact is compared by numbers, the rest can only be run; all comes last, as it is what is wanted
            if parts and not self._holds(selection, parts):
                return culprits(parts, lambda some: self._holds(selection, some))
        return []

    def _holds(self, selection: Selection, lumps: Sequence[int]) -> bool:
        part = _restricted(self.graph, selection, lumps)
        try:
            pruned, plan = self.pruned(part)
        except PruneError:
            return False
        return agrees(self.model, plan, pruned, self.inputs, self.graph.trace)

    def latency(self, selection: Selection) -> float:
        """The measured part of the dense model's seconds that a selection leaves."""
        return relative_latency(self.pruned(selection)[0], self.model, self.inputs)


def collect_evidence(
    model: nn.Module,
    graph: ChannelGraph,
    criteria: Sequence[Criterion],
    calibration: Calibration | None,
    loss: Callable[..., Any] | None,
    seed: int,
) -> Evidence:
    """What ``criteria`` look at, collected once for all of them; :class:`CalibrationError` where data are missing."""
    evidence = Evidence(model, graph, loss=loss, seed=seed)
    asking = [criterion for criterion in criteria if needs(criterion)]
    if asking:
        calibration = check_calibration(calibration, f"criterion {getattr(asking[0], '__name__', asking[0])!r}")
    wanted = {kind for criterion in asking for kind in needs(criterion)}
    if "activations" in wanted and calibration is not None:
        evidence = replace(evidence, activations=collect_activations(model, graph, calibration))
    if "gradients" in wanted and calibration is not None:
        evidence = replace(evidence, gradients=collect_gradients(model, graph, calibration, loss))
    return evidence


def scores_of(criterion: Criterion, evidence: Evidence) -> list[Values]:
    """The scores of all units, group by group; :class:`PruneError` for what are no finite scores, one a unit."""
    scores = []
    for group in evidence.graph.groups:
        values = np.asarray(criterion(group, evidence), dtype=np.float64)
        if values.shape != (group.num_units,):
            raise PruneError(
                f"the criterion gave scores of shape {values.shape} for group {group.name!r}, which has "
                f"{group.num_units} units: return one score a unit"
            )
        if not np.isfinite(values).all():
            raise PruneError(
                f"the criterion gave scores that are not finite for group {group.name!r}: check the weights"
            )
        scores.append(values)
    return scores


def _restricted(graph: ChannelGraph, selection: Selection, lumps: Sequence[int]) -> Selection:
    """The part of a selection that some lumps make: of a group that several lumps share, the first units."""
    if len(lumps) == len(selection.lumps):
        return selection
    counts: dict[int, int] = {}
    for index in lumps:
        for group, number in graph.lumps[index].units.items():
            counts[group] = counts.get(group, 0) + number * selection.lumps[index]
    units = {group: selection.units[group][:count] for group, count in counts.items()}
    return replace(selection, units=units, lumps={index: selection.lumps[index] for index in lumps})


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
