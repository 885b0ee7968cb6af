"""Put thin layers in the place of wide ones, and multiply them back."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from compress.errors import PruneError
from compress.factorize.decompositions import SWEEPS, Grouped, Problem, Split
from compress.factorize.heads import Heads, made_of
from compress.factorize.plan import Factor, FactorPlan
from compress.factorize.tables import Table
from compress.sandbox import unwrapped
from compress.surgery import copied
from layers.attention import LowRankAttention
from layers.balancing import balance
from layers.low_rank import LowRankEmbedding, LowRankLinear
from layers.low_rank_conv import SpatialConv, Tucker2Conv
from layers.replacing import replace_modules

DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
LowRank = LowRankLinear | LowRankEmbedding | Tucker2Conv | SpatialConv | LowRankAttention
LOW_RANK = (LowRankLinear, LowRankEmbedding, Tucker2Conv, SpatialConv, LowRankAttention)
KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "embedding": (nn.Embedding,),
    "attention": (nn.MultiheadAttention,),
}
SPLITS = {"vertical": Split((0,)), "horizontal": Split((1,))}


def factors_of(
    problem: Problem | Table | Heads, factor: Factor, sweeps: int = SWEEPS
) -> tuple[tuple[Tensor, ...], float]:
    """The weights of the thin layers, in the order in which they run, and the error that they leave.

    Spatial kernels are refined by ``sweeps`` of alternating least squares.

    Raises:
        PruneError: a rank is above that of the whole matrix.
    """
    try:
        if isinstance(problem, Table):
            return problem.factors(factor.ranks[0] or 0)
        if isinstance(problem, Heads):
            return problem.factors(factor.ranks), factor.error  # (that was measured)
        first, *_ = ranks = _of_a_group(factor, problem.groups)
        if factor.kind == "spatial":
            assert first is not None
            one, two, error = Grouped(problem, SPLITS[factor.first]).factors(first, sweeps)
            return (one, problem.outer(two)), error
        inner, outer = ranks if factor.kind == "tucker2" else (None, first)
        weights: list[Tensor] = []
        whole, error = problem, 0.0
        if inner is not None:
            split = Grouped(problem, Split())
            reduce, core, error = split.factors(inner)
            weights = [reduce.flatten(1), core]
            problem = split.following(reduce) if outer is not None else problem
        if outer is not None:
            core, expand, more = Grouped(problem, Split(tuple(range(problem.weight.dim() - 2)))).factors(outer)
            weights = [*weights[:1], core, expand.flatten(1)]
            error += more
        return (*weights[:-1], whole.outer(weights[-1])), error
    except PruneError as error_:
        raise PruneError(f"{factor.module!r} cannot become {factor.kind} of ranks {factor.ranks}: {error_}") from None


def _of_a_group(factor: Factor, groups: int) -> tuple[int | None, ...]:
    """Ranks of a plan count all groups together."""
    if any(rank % groups for rank in factor.ranks if rank is not None):
        raise PruneError(f"the layer has {groups} groups, which do not divide that")
    return tuple(None if rank is None else rank // groups for rank in factor.ranks)


def insert(
    model: nn.Module, plan: FactorPlan, weights: Mapping[str, Sequence[Tensor]] | None = None, *, empty: bool = False
) -> None:
    """Carry out ``plan`` on ``model`` itself.

    Args:
        weights: of the thin layers, by module; else they are the best factors of the layer's own weight, as if its
            inputs were white.
        empty: the values do not matter, as others are loaded next.

    Raises:
        PruneError: the plan does not fit; the model is as before.
    """
    dense = {factor.module: _checked(model, factor) for factor in plan.factors}
    made: dict[nn.Module, nn.Module] = {}
    for factor in plan.factors:
        layer = dense[factor.module]
        if empty:
            made[layer] = without_values(layer, factor)
            continue
        given = None if weights is None else weights.get(factor.module)
        given = factors_of(_white(layer, factor), factor)[0] if given is None else given
        made[layer] = _as(layer, _from_weights(layer, factor, given))
    replace_modules(model, made)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) and _has_thin(module):
            # both have a fused path that reads their layers' weights; these keep them from it
            module.use_nested_tensor, module.activation_relu_or_gelu = False, 0


def _has_thin(module: nn.Module) -> bool:
    return any(isinstance(inner, LowRank) for inner in module.modules())


def without_values(layer: Any, factor: Factor) -> LowRank:
    """What takes the place of ``layer``, with random weights."""
    return _as(layer, _by_size(layer, factor))


def unfactorize(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every thin layer (:mod:`layers.low_rank`) is multiplied back into one layer.

    It computes the same, and has the class and the parameter names of the model before factorisation; a layer that was
    no layer of ``torch.nn`` becomes one.

    >>> model = nn.Sequential(LowRankLinear(6, 4, rank=2), nn.ReLU())
    >>> unfactorize(model)[0]
    Linear(in_features=6, out_features=4, bias=True)
    """
    model = copied(unwrapped(model))
    made: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, LowRank):
            made[module] = module.merge().train(module.training)
    if model in made:
        return made[model]
    replace_modules(model, made)
    return model


def _checked(model: nn.Module, factor: Factor) -> Any:
    try:
        layer = model.get_submodule(factor.module)
    except AttributeError:
        raise PruneError(
            f"the plan replaces {factor.module!r}, which the model does not have: is it another class?"
        ) from None
    kinds = KINDS.get(factor.kind, DENSE[1:])
    weight = weight_of(layer)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else "no weight"
    if not (factor.settings or isinstance(layer, kinds)) or shape != factor.shape or not factor.module:
        raise PruneError(
            f"the plan was made for {factor.module!r} with a weight of shape {factor.shape}, here it is a "
            f"{type(layer).__name__} with {shape}: apply it to a dense instance of the same architecture"
        )
    return layer


def balanced(model: nn.Module, plan: FactorPlan) -> None:
    """Factors of alike size in the thin layers of ``plan``, in place: see :mod:`layers.balancing`."""
    for factor in plan.factors:
        if factor.kind != "attention":  # is made so
            balance(model.get_submodule(factor.module))


def weight_of(layer: Any) -> Any:
    """The one weight, or the last."""
    return layer.out_proj.weight if isinstance(layer, nn.MultiheadAttention) else getattr(layer, "weight", None)


def _white(layer: Any, factor: Factor) -> Problem | Table | Heads:
    """The layer's own weight, as if its inputs were white."""
    if factor.kind == "attention":
        return Heads.of(layer)
    if factor.kind == "embedding":
        return Table.of(layer.weight)
    weight = layer.weight.T if factor.settings.get("transposed") else layer.weight
    return Problem.of(weight, groups=1 if factor.kind == "linear" else _options(layer, factor)["groups"])


def _from_weights(layer: Any, factor: Factor, weights: Sequence[Tensor]) -> LowRank:
    if factor.kind == "attention":
        return made_of(layer, weights)
    cast = [w.to(layer.weight) for w in weights]
    if factor.kind == "embedding":
        return LowRankEmbedding.from_factors(cast[0], cast[1], padding_idx=layer.padding_idx)
    bias = None if layer.bias is None else layer.bias.detach()
    if factor.kind == "linear":
        return LowRankLinear.from_factors(cast[1], cast[0], bias)
    options = _options(layer, factor)
    if factor.kind == "spatial":
        return SpatialConv.from_factors(cast[0], cast[1], bias, **options)
    inner, outer = factor.ranks
    return Tucker2Conv.from_factors(
        cast[0 if inner is None else 1],
        reduce=None if inner is None else cast[0],
        expand=None if outer is None else cast[-1],
        bias=bias,
        **options,
    )


def _by_size(layer: Any, factor: Factor) -> LowRank:
    """Parameters without values that matter."""
    rank = factor.ranks[0] or 0
    if factor.kind == "attention":
        return LowRankAttention.from_dense(layer, (rank, factor.ranks[1] or 0))
    if factor.kind == "embedding":
        return LowRankEmbedding(*factor.shape, rank, padding_idx=layer.padding_idx)  # type: ignore[misc]
    bias = layer.bias is not None
    outputs, inputs, *kernel = factor.shape
    if factor.kind == "linear":
        sizes = (outputs, inputs) if factor.settings.get("transposed") else (inputs, outputs)
        return LowRankLinear(*sizes, rank, bias=bias)
    options = _options(layer, factor)
    inputs *= options["groups"]
    if factor.kind == "spatial":
        return SpatialConv(inputs, outputs, (kernel[0], kernel[1]), rank, first=factor.first, bias=bias, **options)
    return Tucker2Conv(inputs, outputs, kernel, (factor.ranks[0], factor.ranks[1]), bias=bias, **options)


def _options(layer: Any, factor: Factor) -> dict[str, Any]:
    if factor.settings:
        return dict(factor.settings)
    return {"stride": layer.stride, "padding": _padding(layer), "dilation": layer.dilation, "groups": layer.groups}


def _padding(layer: Any) -> tuple[int, ...]:
    """As numbers; `_reversed_padding_repeated_twice` has both ends of each axis, the last axis first."""
    padding = layer._reversed_padding_repeated_twice[::-2] if isinstance(layer.padding, str) else layer.padding
    return tuple(padding)


def _as(layer: Any, made: LowRank) -> LowRank:
    """On the device, in the dtype and in the mode of ``layer``, and trainable as it is."""
    weight = weight_of(layer)
    return made.to(weight.device, weight.dtype).train(layer.training).requires_grad_(weight.requires_grad)
