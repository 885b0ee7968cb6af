"""Shrink a model to a budget: prune, factorise what is left, recover the whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from compress.budget import Budget
from compress.calibration import Calibration, batches, check_calibration
from compress.channels import ChannelGraph, trace
from compress.cost import PAIRS_SECONDS, Cost, cost_of, relative_latency
from compress.criteria import Criterion
from compress.errors import BudgetError, PruneError
from compress.factorize.factorizing import GLANCE
from compress.factorize.look import Look
from compress.factorize.options import METHODS as FACTORISATIONS
from compress.factorize.surgery import balanced
from compress.factorize.targets import Targets
from compress.pruning import PruneResult
from compress.recover import Recovery, methods_of
from compress.recover import recover as recovered
from compress.sandbox import no_collections, on_meta, unwrapped
from compress.shrink.allocation import Allocation, Candidate, least
from compress.shrink.plan import ShrinkPlan
from compress.shrink.pruner import Pruner
from compress.trace import ExampleInputs, record
from compress.trial import Trial, first_samples

METHODS = ("prune", "factorize")
METRICS = ("macs", "params", "latency")
NUM_TRIED = 256  # samples that tell what a division of the budget costs


@dataclass(frozen=True)
class ShrinkResult:
    """A shrunk model and how it came about.

    ``pruning`` is the first step by itself, None where nothing was pruned. ``left`` says by parameter why a layer
    cannot be factorised, ``notes`` what a user should know, ``recovery`` what was won back without training.
    ``latency`` is measured: seconds of the model on the example inputs as a part of the dense model's.
    """

    model: nn.Module
    plan: ShrinkPlan
    before: Cost
    after: Cost
    latency: float
    pruning: PruneResult | None = None
    left: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    recovery: Recovery | None = None

    def summary(self) -> str:
        """Before, between and after as a table, with what became of each layer."""
        from compress.shrink.table import result_table

        return result_table(self)


@no_collections()
def shrink(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    budget: Budget,
    methods: Sequence[str] = METHODS,
    calibration: Calibration | None = None,
    criterion: str | Criterion = "reconstruction",
    recover: bool | Sequence[str] = True,
    exact_only: bool = False,
    protect: Sequence[str] = (),
    seed: int = 0,
) -> ShrinkResult:
    """Prune ``model`` and factorise what is left, so that it meets ``budget``. The model itself is not changed.

    How much of the budget pruning spends is what makes the model's outputs lose least on some of the calibration
    data; either method may end up doing all of it. Nothing is trained.

    Args:
        model: any module, in any mode.
        example_inputs: what it is called with: a tensor, a tuple of arguments, or a dict of keyword arguments.
        budget: the fraction to keep of macs, params or latency; never exceeded. Latency is measured on this machine,
            beside the dense model, for each division of the budget: that takes minutes, not seconds.
        methods: "prune" (see :func:`compress.prune`) and "factorize" (see :func:`compress.factorize`), or one of them.
        calibration: batches of inputs, without labels unless the criterion needs them; a DataLoader will do.
        criterion: which channels go first: as for :func:`compress.prune`.
        recover: refit the new model to the dense one from ``calibration``, without training: True, or names from
            :data:`compress.recover.METHODS`.
        exact_only: prune only what can be removed exactly.
        protect: shell patterns of parameter or module names that stay as they are, such as ``"head.*"``.
        seed: for the positions of images that are looked at.

    Raises:
        TraceError: the model does not run on its example inputs.
        BudgetError: the budget cannot be reached; says what can. Or it is of channels.
        CalibrationError: there are no data, or they do not fit.
        PruneError: nothing can be changed (the reasons are listed), or an option is unknown.
    """
    model = unwrapped(model)
    _check_options(budget, methods)
    recovery_methods = methods_of(recover)
    calibration = check_calibration(calibration, "shrink")
    if on_meta(model):
        raise PruneError("a model on the meta device has no values to go by: load its weights first")
    graph = trace(model, example_inputs).protecting(protect)
    graph = graph.exactly() if exact_only else graph
    factorisations = FACTORISATIONS if "factorize" in methods else ()
    targets = Targets()
    if factorisations:
        targets = Targets.of(model, graph.trace, factorisations, protect, example_inputs)
    can_prune = "prune" in methods and len(graph.groups) > 0
    if not can_prune and not targets:
        raise PruneError(f"nothing can be shrunk: {_reasons(graph, targets.left)}")
    before, metric = cost_of(model, graph.trace), budget.metric
    pruner = Pruner(model, example_inputs, criterion, calibration, exact_only=exact_only, protect=protect, seed=seed)
    furthest = pruner.towards(budget) if can_prune else None
    look = Look.at(
        model, graph.trace, targets, calibration,
        known=pruner.sums, recovered="least_squares" in recovery_methods, seed=seed,
    )  # fmt: skip
    trial = Trial(model, first_samples((inputs for inputs, _ in batches(calibration, model)), NUM_TRIED))
    methods = factorisations if targets else ()
    allocation = Allocation(model, example_inputs, look, before, budget, trial, methods=methods, protect=protect)
    lowest = allocation.kept(furthest)

    def at(kept: float) -> Candidate:
        if kept <= lowest or kept >= 1:
            return allocation.candidate(furthest if kept <= lowest else None)
        return allocation.candidate(pruner.to(Budget(**{metric: kept})))

    best = least(at, lowest, 1.0 if targets else lowest)
    again = best.choice if metric == "latency" else None  # the clock would choose others now
    best = allocation.candidate(best.pruning, quickly=False, choice=again)
    made, factors = best.model, best.factors
    after = cost_of(made, record(made, example_inputs, training=False))
    notes = [*graph.trace.notes, *(best.pruning.notes if best.pruning else ()), *targets.notes]
    notes += look.scarce([factor.module for factor in factors.factors])
    recovery = None
    if recovery_methods and (best.removed.groups or factors.factors):
        recovery = recovered(
            made, model, best.removed, calibration, recovery_methods, seed=seed, origins=factors.origins
        )
        notes += recovery.notes
    balanced(made, factors)
    plan = ShrinkPlan(tuple(step for step in (best.removed, factors) if step != type(step)()))
    latency = relative_latency(made, model, example_inputs, seconds=PAIRS_SECONDS if metric == "latency" else GLANCE)
    left = {**targets.left, **best.left}
    return ShrinkResult(made, plan, before, after, latency, best.pruning, left, tuple(dict.fromkeys(notes)), recovery)


def _check_options(budget: Budget, methods: Sequence[str]) -> None:
    for method in methods:
        if method not in METHODS:
            raise PruneError(f"method {method!r} is unknown: choose among {', '.join(METHODS)}")
    if not methods:
        raise PruneError(f"no method is given: choose among {', '.join(METHODS)}")
    if budget.metric not in METRICS:
        raise BudgetError(
            f"shrink spends macs, params or latency, not {budget.metric}: pass Budget(macs={budget.fraction}), or "
            "prune alone"
        )


def _reasons(graph: ChannelGraph, left: Mapping[str, str]) -> str:
    found = [f"{name}: {reason}" for name, reason in left.items()] + [str(axis) for axis in graph.frozen]
    return "; ".join(found[:6]) or "the model has no weights"
