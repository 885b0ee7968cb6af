"""Factorise a model to a budget: trace, gather Gram matrices, choose ranks, replace layers, recover."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from compress.budget import Budget
from compress.calibration import Calibration, check_calibration
from compress.cost import Cost, cost_of, relative_latency
from compress.errors import BudgetError, PruneError
from compress.factorize.clock import timed, within_latency
from compress.factorize.decompositions import SWEEPS
from compress.factorize.look import Look
from compress.factorize.means import keep_means
from compress.factorize.options import METHODS, Layer, Option
from compress.factorize.plan import FactorPlan
from compress.factorize.selection import Choice, by_energy, cost, within_budget
from compress.factorize.surgery import SPLITS, balanced, factors_of, insert
from compress.factorize.targets import Targets
from compress.factorize.vbmf import by_vbmf, vbmf_inner_rank
from compress.plan import PrunePlan
from compress.recover import Recovery, methods_of
from compress.recover import recover as recovered
from compress.sandbox import no_collections, on_meta, unwrapped
from compress.surgery import copied
from compress.trace import ExampleInputs, record

GLANCE = 0.2  # seconds in which the latency that no budget asks for is measured


@dataclass(frozen=True)
class FactorResult:
    """A factorised model and how it came about.

    ``left`` says by parameter why a layer cannot be factorised (those that can, and are not, are dense because the
    budget did not need them), ``notes`` what a user should know, ``recovery`` what was won back without training.
    ``latency`` is measured: seconds of the model on the example inputs as a part of the dense model's.
    """

    model: nn.Module
    plan: FactorPlan
    before: Cost
    after: Cost
    latency: float
    left: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    recovery: Recovery | None = None

    def summary(self) -> str:
        """Before and after as a table, with the ranks of each layer."""
        from compress.factorize.table import result_table

        return result_table(self)


@no_collections()
def factorize(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    budget: Budget | None = None,
    energy: float | str | None = None,
    methods: Sequence[str] = METHODS,
    calibration: Calibration | None = None,
    recover: bool | Sequence[str] = True,
    protect: Sequence[str] = (),
    seed: int = 0,
) -> FactorResult:
    """Replace layers of ``model`` by two or three thin ones, until it meets ``budget``. The model is not changed.

    A layer is factorised so that its outputs on the calibration data lose least of what the model's outputs depend on,
    and the budget is spent where those lose least, to first order (see :mod:`compress.curvature`). Source: Kim et al.
    2016, "Compression of deep convolutional neural networks", section 3.1 (tucker2); Jaderberg et al. 2014, "Speeding
    up convolutional neural networks with low rank expansions", section 2.1 (spatial).

    Args:
        model: any module, in any mode.
        example_inputs: what it is called with: a tensor, a tuple of arguments, or a dict of keyword arguments.
        budget: the fraction to keep of macs, params or latency; never exceeded. Latency is measured on this machine,
            beside the dense model; layers that are faster as they are stay.
        energy: instead of a budget, the part of the second moment of its outputs that each layer keeps, in (0, 1); or
            "vbmf" for the ranks that :func:`compress.factorize.vbmf_rank` finds in each weight.
        methods: some of "tucker2" (1 x 1, k x k, 1 x 1; either 1 x 1 may be left out), "svd" (dense layers, 1 x 1
            convolutions, embeddings), "spatial" (k x 1 and 1 x k, or the other way round) and "attention" (the products
            of queries with keys, and of values with the outputs' weights, of :class:`torch.nn.MultiheadAttention`).
        calibration: batches of inputs, without labels; a DataLoader will do.
        recover: refit the new model from ``calibration``, without training: True, or names from
            :data:`compress.recover.METHODS`.
        protect: shell patterns of parameter or module names that stay as they are, such as ``"head.*"``.
        seed: for the positions of images that are looked at.

    Raises:
        TraceError: the model does not run on its example inputs.
        BudgetError: the budget cannot be reached; says what can. Or it is of channels.
        CalibrationError: there are no data, or they do not fit.
        PruneError: nothing can be factorised (the reasons are listed), or an option is unknown.
    """
    model = unwrapped(model)
    metric = _checked_options(budget, energy, methods)
    chosen_recovery = methods_of(recover)
    calibration = check_calibration(calibration, "factorize")
    if on_meta(model):
        raise PruneError("a model on the meta device has no values to factorise: load its weights first")
    trace = record(model, example_inputs, training=False)
    before = cost_of(model, trace)
    targets = Targets.of(model, trace, methods, protect, example_inputs)
    look = Look.at(
        model, trace, targets, calibration,
        competing=budget is not None, recovered="least_squares" in chosen_recovery, seed=seed,
    )  # fmt: skip
    inner_rank = vbmf_inner_rank if energy == "vbmf" else None
    layers, left = look.layers(model, targets, methods, inner_rank, refined=budget is not None)
    if not layers:
        raise PruneError(
            f"nothing can be factorised: {_reasons(left) or 'the model has no convolution or dense layer'}"
        )
    latency = None
    if metric == "latency":
        assert budget is not None
        layers, slow = timed(model, layers, targets.shapes)
        left |= slow
        choice, latency = within_latency(model, example_inputs, layers, budget.fraction)
    elif budget is not None:
        choice = within_budget(layers, metric, getattr(before, metric), budget.fraction)
    else:
        choice = by_vbmf(layers) if isinstance(energy, str) else by_energy(layers, energy or 0.0)
    plan, weights = built(layers, choice, metric)
    made = copied(model)
    insert(made, plan, weights)
    if budget is not None:
        keep_means(made, layers, plan, look.grams)
    after = cost_of(made, record(made, example_inputs, training=False))
    if latency is None:
        latency = relative_latency(made, model, example_inputs, seconds=GLANCE)
    recovery, notes = None, [*trace.notes, *look.scarce(choice), *targets.notes]
    if chosen_recovery and plan.factors:
        recovery = recovered(
            made, model, PrunePlan.empty(), calibration, chosen_recovery, seed=seed, origins=plan.origins
        )
        notes += recovery.notes
    balanced(made, plan)
    return FactorResult(made, plan, before, after, latency, left, tuple(notes), recovery)


def _checked_options(budget: Budget | None, energy: float | str | None, methods: Sequence[str]) -> str:
    """The budget's metric."""
    for method in methods:
        if method not in METHODS:
            raise PruneError(f"method {method!r} is unknown: choose among {', '.join(METHODS)}")
    if (budget is None) == (energy is None):
        raise BudgetError("factorize takes a budget or an energy: pass budget=Budget(macs=0.5), or energy=0.99")
    if isinstance(energy, str) and energy != "vbmf":
        raise BudgetError(f'energy={energy!r} is unknown: pass "vbmf", or a number between 0 and 1')
    if isinstance(energy, float | int) and not 0 < energy < 1:
        raise BudgetError(f"energy={energy} is the part of each layer's outputs that stays: between 0 and 1")
    if budget is not None and budget.metric == "channels":
        raise BudgetError(
            f"factorize spends macs, params or latency, not channels: pass Budget(macs={budget.fraction})"
        )
    return "macs" if budget is None else budget.metric


def built(
    layers: Sequence[Layer], choice: Choice, metric: str, *, quickly: bool = False
) -> tuple[FactorPlan, dict[str, tuple[Tensor, ...]]]:
    """The plan of a choice, with the weights of the thin layers; of spatial kernels the better of both orders, refined,
    unless it is done ``quickly``."""
    factors, weights = [], {}
    for layer in layers:
        if layer.name not in choice:
            continue
        found = []
        for option in [choice[layer.name]] if quickly else _orders(layer, choice[layer.name], metric):
            factor = layer.factor(option)
            made, error = factors_of(layer.problem, factor, 0 if quickly else SWEEPS)
            found.append((error, replace(factor, error=error), made))
        _, factor, weights[layer.name] = min(found, key=lambda each: each[0])
        factors.append(factor)
    return FactorPlan(tuple(factors)), weights


def _orders(layer: Layer, option: Option, metric: str) -> list[Option]:
    """The option, and the one with the kernels in the other order that costs no more."""
    others = [
        other
        for other in layer.options
        if option.kind == other.kind == "spatial"
        and other.first in {*SPLITS} - {option.first}
        and cost(other, metric) <= cost(option, metric)
    ]
    return [option, *([max(others, key=lambda other: cost(other, metric))] if others else [])]


def _reasons(left: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5])
