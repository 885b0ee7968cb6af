"""Prune a model to a budget: trace, score, select, cut, verify, recover."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from compress.attempt import Attempt
from compress.balance import TaskLosses
from compress.budget import Budget
from compress.calibration import Calibration, check_calibration
from compress.channels import ChannelGraph, trace
from compress.choice import COMBINATIONS, Chooser
from compress.cost import Cost, cost_of
from compress.criteria import Criterion, resolve
from compress.errors import PruneError
from compress.evidence import Values
from compress.plan import PrunePlan
from compress.recorder import Trace
from compress.recover import Recovery, methods_of
from compress.recover import recover as recovered
from compress.sandbox import no_collections, on_meta, unwrapped
from compress.score import check_needs, collect_evidence, judge
from compress.select import FLOOR, SelectOptions
from compress.surgery import move_optimizer
from compress.tasks import ByTask, counts_of, is_by_task, views_of, whole
from compress.trace import ExampleInputs, record
from compress.verify import check_repeatable

HELD_OUT = 10  # of so many batches one tells what recovery helps, up to one of each task


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
    task_losses: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> str:
        """Before and after as a table, with what is left of each layer."""
        from compress.table import result_table

        return result_table(self)


@no_collections()
def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    budget: Budget,
    criterion: str | Criterion = "l2",
    scope: str = "global",
    combine: str | None = None,
    calibration: Calibration | Mapping[str, Calibration] | None = None,
    loss: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = None,
    recover: bool | Sequence[str] = False,
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
        combine: for models that give {task: output}: the criterion judges for each task by itself, relative to what the
            task has. Channels then go by the "mean" over tasks, by the task that loses most ("max"), or ("balanced",
            which looks at data whatever the criterion) by weights of the tasks that keep the worst task's loss small.
        calibration: batches for criteria that look at data, and for ``recover``; a DataLoader will do. With ``combine``
            also {task: batches}; targets may be {task: target}.
        loss: ``loss(output, target)`` for criteria that need gradients, cross-entropy on class indices if None. With
            ``combine`` one for all tasks or {task: loss}, each of the task's own output and target.
        recover: repair the pruned model from ``calibration`` alone, without labels or training: True, or names from
            :data:`compress.recover.METHODS`; each is kept where it helps on held-out data. With {task: batches}, a
            layer that some tasks see (a head) is refitted to their data, and others' count a tenth.
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
    methods = methods_of(recover)
    if combine is not None and combine not in COMBINATIONS:
        raise PruneError(f"combine={combine!r} is unknown: choose one of {', '.join(COMBINATIONS)}")
    if methods or combine == "balanced":
        needed_by = f"recover={recover!r}" if methods else "combine='balanced'"
        calibration = calibration if is_by_task(calibration) else check_calibration(calibration, needed_by)
    check_needs([score], calibration)
    graph = trace(model, example_inputs).protecting(protect)
    views = [whole(calibration, loss)] if combine is None else views_of(graph.trace, calibration, loss)
    data = ByTask(calibration) if is_by_task(calibration) else calibration
    graph = graph.exactly() if exact_only else graph
    evidence = collect_evidence(model, graph, [score], views, seed)
    losses = TaskLosses(model, views) if combine is not None and calibration is not None else None
    notes = list(graph.trace.notes)
    if on_meta(model):
        notes.append("not verified: the model is on the meta device and has no values")

    def repair(pruned: nn.Module, plan: PrunePlan, weights: Values | None) -> Recovery | None:
        if not methods or data is None or not plan.groups:
            return None
        if not isinstance(data, ByTask):
            return recovered(pruned, model, plan, data, methods, seed=seed)
        held_out = max(1, min(len(views), len(data) // HELD_OUT))
        count = counts_of(views, data, weights)
        return recovered(pruned, model, plan, data, methods, seed=seed, num_held_out=held_out, count=count)

    while True:
        judged = [judge(score, replace(own, graph=graph), view) for own, view in zip(evidence, views, strict=True)]
        attempt = Attempt(model, example_inputs, graph)
        chooser = Chooser(attempt, judged, budget, options, timed)
        choice = chooser.by(COMBINATIONS[combine or "mean"])
        failed = [] if on_meta(model) else attempt.failing_lumps(choice.selection)
        if combine == "balanced" and losses is not None and not failed:
            choice = chooser.balanced(losses, repair)
            failed = attempt.failing_lumps(choice.selection)
        if not failed:
            break
        check_repeatable(model, example_inputs, graph.trace)
        names = sorted({graph.groups[g].name for index in failed for g in graph.lumps[index].units})
        notes.append(f"kept whole, as removal did not verify: {', '.join(names)}")
        graph = graph.without(_of_their_kind(graph, failed), "its removal did not verify")
    if (floor := choice.selection.floor) < FLOOR:
        notes.append(f"the budget needed axes of down to {floor:.0%} of their length (usually {FLOOR:.0%})")
    notes += attempt.notes
    pruned, plan = attempt.pruned(choice.selection)
    if optimizer is not None:
        move_optimizer(optimizer, model, pruned, plan)
    recovery = repair(pruned, plan, choice.weights)
    notes += recovery.notes if recovery is not None else ()
    if graph.trace.real:  # another number of proposals, say, would be counted: price what the dense model ran
        macs = round(attempt.price("macs")(choice.selection.kept(graph.sizes)) * attempt.before.macs)
        after = replace(cost_of(pruned, Trace()), macs=macs)
    else:
        after = cost_of(pruned, record(pruned, example_inputs, training=False))
    named = {f"{group.name}#{group.index}": values for group, values in zip(graph.groups, choice.scores, strict=True)}
    lost = {} if losses is None else losses.by_name(pruned)
    return PruneResult(pruned, plan, attempt.before, after, _kept(graph, plan), named, tuple(notes), recovery, lost)


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
