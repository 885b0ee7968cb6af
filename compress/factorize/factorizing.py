"""Factorise a model to a budget: trace, gather Gram matrices, choose ranks, replace layers, recover."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from compress.budget import Budget
from compress.calibration import Calibration, batches, check_calibration, num_batches_of
from compress.cost import Cost, cost_of, relative_latency
from compress.curvature import output_curvature, weighed
from compress.errors import BudgetError, PruneError
from compress.factorize.attention import (
    SAMPLES,
    Attention,
    MomentsCollector,
    find_attentions,
    losses,
    moments_of,
    written_out,
)
from compress.factorize.clock import timed, within_latency
from compress.factorize.decompositions import SWEEPS
from compress.factorize.heads import Heads
from compress.factorize.means import centred, keep_means
from compress.factorize.options import METHODS, Layer, Option, attention_layers, layers_of, table_layers
from compress.factorize.plan import FactorPlan
from compress.factorize.replaceable import factorable, owner_of
from compress.factorize.selection import Choice, by_energy, cost, within_budget
from compress.factorize.surgery import SPLITS, factors_of, insert
from compress.factorize.tables import TokenCounter, find_tables
from compress.factorize.vbmf import by_vbmf, vbmf_inner_rank
from compress.gram import GramCollector, Grams, GramSums
from compress.names import protected
from compress.plan import PrunePlan
from compress.recorder import Op, Trace
from compress.recover import Recovery, methods_of
from compress.recover import recover as recovered
from compress.sandbox import no_collections, on_meta, unwrapped
from compress.sites import Key, Site, find_sites
from compress.surgery import copied
from compress.trace import ExampleInputs, record
from compress.trial import first_samples
from compress.watch import gather

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
    sites, left = unprotected(model, trace, protect, example_inputs)
    tables, left = _tables(model, trace, left, methods, protect)
    attentions, left = _attentions(model, trace, left, methods, protect, example_inputs)
    grams, counts, pairs = _gathered(model, trace, calibration, sites, list(tables), attentions, seed)
    # where layers compete, errors count by what they cost the model's outputs
    every = [known.site for known in grams.values()]
    curvature = output_curvature(model, calibration, every, tables, seed=seed) if budget is not None else {}
    grams = weighed(grams, curvature)
    known = centred(grams) if budget is not None else grams
    inner_rank = vbmf_inner_rank if energy == "vbmf" else None
    layers, without = layers_of(model, sites, known, methods, inner_rank, refined=budget is not None)
    of_tables, more = table_layers(model, tables, counts, curvature)
    of_attentions = _attention_layers(model, attentions, grams, pairs, calibration)
    layers, left = [*layers, *of_tables, *of_attentions], left | without | more
    if not layers:
        raise PruneError(
            f"nothing can be factorised: {_reasons(left) or 'the model has no convolution or dense layer'}"
        )
    latency = None
    if metric == "latency":
        assert budget is not None
        shapes = {owner_of(site): site.source.shape for site in sites}
        layers = timed(model, layers, shapes | {name: each.source for name, each in attentions.items()})
        left |= {f"{layer.name}.weight": "it is faster as it is" for layer in layers if not layer.options}
        choice, latency = within_latency(model, example_inputs, layers, budget.fraction)
    elif budget is not None:
        choice = within_budget(layers, metric, getattr(before, metric), budget.fraction)
    else:
        choice = by_vbmf(layers) if isinstance(energy, str) else by_energy(layers, energy or 0.0)
    plan, weights = built(layers, choice, metric)
    made = copied(model)
    insert(made, plan, weights)
    if budget is not None:
        keep_means(made, layers, plan, grams)
    after = cost_of(made, record(made, example_inputs, training=False))
    if latency is None:
        latency = relative_latency(made, model, example_inputs, seconds=GLANCE)
    recovery, notes = None, [*trace.notes, *scarce(grams, choice), *_alone(trace, attentions, methods)]
    if chosen_recovery and plan.factors:
        recovery = recovered(
            made, model, PrunePlan.empty(), calibration, chosen_recovery, seed=seed, origins=plan.origins
        )
        notes += recovery.notes
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


def unprotected(
    model: nn.Module, trace: Trace, protect: Sequence[str], example_inputs: ExampleInputs
) -> tuple[list[Site], dict[str, str]]:
    """The sites whose layer can be replaced and may be, and by parameter why others are left."""
    whole = _matching(trace, protect)
    free = [site for site in find_sites(trace) if site.parameter not in whole]
    sites, left = factorable(model, trace, free, example_inputs)
    weights = {name for name in whole if len(trace.parameters[name].shape) > 1}
    return sites, left | dict.fromkeys(sorted(weights), "it is protected")


def _tables(
    model: nn.Module, trace: Trace, left: Mapping[str, str], methods: Sequence[str], protect: Sequence[str]
) -> tuple[dict[str, Op], dict[str, str]]:
    """The embeddings that can be replaced and may be, and by parameter why anything is left."""
    tables, others = find_tables(model, trace)
    if "svd" not in methods:
        others |= dict.fromkeys(tables, 'a table is factorised by the method "svd"')
    others |= dict.fromkeys(tables.keys() & _matching(trace, protect), "it is protected")
    free = {name: op for name, op in tables.items() if name not in others}
    return free, {name: reason for name, reason in left.items() if name not in free} | others


def _attentions(
    model: nn.Module, trace: Trace, left: Mapping[str, str], methods: Sequence[str], protect: Sequence[str],
    example_inputs: ExampleInputs,
) -> tuple[dict[str, Attention], dict[str, str]]:  # fmt: skip
    """The attentions that can be replaced and may be, and by parameter why anything is left."""
    if "attention" not in methods:
        return {}, dict(left)
    found, others = find_attentions(model, trace, find_sites(trace), example_inputs)
    whole = {name.rpartition(".")[0].removesuffix(".out_proj") for name in _matching(trace, protect)}
    free = {name: each for name, each in found.items() if name not in whole}
    mine = {name for name in left for module in free if name.startswith(f"{module}.")}
    kept = {name: others.get(name, reason) for name, reason in left.items() if name not in mine}
    return free, kept


def _attention_layers(
    model: nn.Module,
    attentions: Mapping[str, Attention],
    grams: Mapping[Key, GramSums],
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    calibration: Calibration,
) -> list[Layer]:
    if not attentions:
        return []
    heads = {}
    for name, each in attentions.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.MultiheadAttention)
        heads[name] = Heads.of(layer, moments_of(grams[each.site.key], pairs[name], each.num_heads))
    inputs = next(iter(first_samples((inputs for inputs, _ in batches(calibration, model)), SAMPLES)))
    return attention_layers(model, attentions, heads, losses(model, heads, inputs))


def _alone(trace: Trace, attentions: Mapping[str, Attention], methods: Sequence[str]) -> list[str]:
    """A note where attention is none of :class:`torch.nn.MultiheadAttention`."""
    others = [name for name in written_out(trace) if name not in attentions]
    if "attention" not in methods or not others:
        return []
    return [
        f"{len(others)} attentions ({others[0] or 'of the model itself'} ...) are no nn.MultiheadAttention, or left as "
        "they are: their layers are factorised one by one, not by the products of queries with keys and of values"
    ]


def _matching(trace: Trace, protect: Sequence[str]) -> set[str]:
    return {name for pattern in protect for name in protected(pattern, trace.parameters)}


def _gathered(
    model: nn.Module,
    trace: Trace,
    calibration: Calibration,
    sites: Sequence[Site],
    tables: Sequence[str],
    attentions: Mapping[str, Attention],
    seed: int,
) -> tuple[Mapping[Key, GramSums], Mapping[str, Tensor], Mapping[str, tuple[Tensor, Tensor]]]:
    """What enters each site, how often each token is looked up, and what meets in each attention."""
    sites = [*sites, *(each.site for each in attentions.values())]
    grams, counts, pairs = gather(
        model,
        trace,
        calibration,
        [
            lambda: GramCollector(sites, num_batches_of(calibration), seed=seed),
            lambda: TokenCounter(tables),
            lambda: MomentsCollector(attentions.values()),
        ],
    )
    assert isinstance(grams, Grams)
    return grams.sums, counts, pairs


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


def scarce(sums: Mapping[Key, GramSums], chosen: Collection[str]) -> list[str]:
    """A note where the layers that were chosen have seen too few samples."""
    few = [key[0] for key, known in sums.items() if known.scarce and key[0].removesuffix(".weight") in chosen]
    if not few:
        return []
    return [f"too few calibration samples for {len(few)} layers ({few[0]} ...): a ridge was used; pass more data"]


def _reasons(left: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5])
