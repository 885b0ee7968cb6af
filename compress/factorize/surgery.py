"""Put thin layers in the place of wide ones, and multiply them back."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from compress.errors import PruneError
from compress.factorize.decompositions import Factorisation, Problem, Split
from compress.factorize.plan import Factor, FactorPlan
from compress.sandbox import unwrapped
from layers.low_rank import LowRankLinear, SpatialConv, Tucker2Conv

Dense = nn.Linear | nn.Conv1d | nn.Conv2d
LowRank = LowRankLinear | Tucker2Conv | SpatialConv
SPLITS = {"vertical": Split((0,)), "horizontal": Split((1,))}


def factors_of(problem: Problem, factor: Factor) -> tuple[tuple[Tensor, ...], float]:
    """The weights of the thin layers, in the order in which they run, and the error that they leave.

    Raises:
        PruneError: a rank is above that of the whole matrix.
    """
    try:
        if factor.kind == "spatial":
            (rank,) = factor.ranks
            assert rank is not None
            first, second, error = Factorisation(problem, SPLITS[factor.first]).factors(rank)
            return (first, second), error
        inner, outer = factor.ranks if factor.kind == "tucker2" else (None, factor.ranks[0])
        weights: list[Tensor] = []
        error = 0.0
        if inner is not None:
            split = Factorisation(problem, Split())
            reduce, core, error = split.factors(inner)
            weights = [reduce.flatten(1), core]
            problem = split.following(reduce) if outer is not None else problem
        if outer is not None:
            core, expand, more = Factorisation(problem, Split(tuple(range(problem.weight.dim() - 2)))).factors(outer)
            weights = [*weights[:1], core, expand.flatten(1)]
            error += more
        return tuple(weights), error
    except PruneError as error_:
        raise PruneError(f"{factor.module!r} cannot become {factor.kind} of ranks {factor.ranks}: {error_}") from None


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
            made[layer] = _as(layer, _by_size(layer, factor))
            continue
        given = None if weights is None else weights.get(factor.module)
        given = factors_of(Problem.of(layer.weight), factor)[0] if given is None else given
        made[layer] = _as(layer, _from_weights(layer, factor, given))
    _replace(model, made)


def unfactorize(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every layer of :mod:`layers.low_rank` is multiplied back into one layer.

    It computes the same, and has the class and the parameter names of the model before factorisation.

    >>> model = nn.Sequential(LowRankLinear(6, 4, rank=2), nn.ReLU())
    >>> unfactorize(model)[0]
    Linear(in_features=6, out_features=4, bias=True)
    """
    model = copy.deepcopy(unwrapped(model))
    made: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, LowRankLinear | Tucker2Conv | SpatialConv):
            made[module] = module.merge().train(module.training)
    if model in made:
        return made[model]
    _replace(model, made)
    return model


def _checked(model: nn.Module, factor: Factor) -> Dense:
    try:
        layer = model.get_submodule(factor.module)
    except AttributeError:
        raise PruneError(
            f"the plan replaces {factor.module!r}, which the model does not have: is it another class?"
        ) from None
    kinds = (nn.Linear,) if factor.kind == "linear" else (nn.Conv1d, nn.Conv2d)
    weight = getattr(layer, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else "no weight"
    if not isinstance(layer, kinds) or shape != factor.shape or not factor.module:
        raise PruneError(
            f"the plan was made for {factor.module!r} with a weight of shape {factor.shape}, here it is a "
            f"{type(layer).__name__} with {shape}: apply it to a dense instance of the same architecture"
        )
    return layer


def _from_weights(layer: Dense, factor: Factor, weights: Sequence[Tensor]) -> LowRank:
    cast = [w.to(layer.weight) for w in weights]
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, nn.Linear):
        return LowRankLinear.from_factors(cast[1], cast[0], bias)
    if factor.kind == "spatial":
        return SpatialConv.from_factors(cast[0], cast[1], bias, **_options(layer))
    inner, outer = factor.ranks
    return Tucker2Conv.from_factors(
        cast[0 if inner is None else 1],
        reduce=None if inner is None else cast[0],
        expand=None if outer is None else cast[-1],
        bias=bias,
        **_options(layer),
    )


def _by_size(layer: Dense, factor: Factor) -> LowRank:
    """Parameters without values that matter."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        assert factor.ranks[0] is not None
        return LowRankLinear(layer.in_features, layer.out_features, factor.ranks[0], bias=bias)
    sizes = layer.in_channels, layer.out_channels, layer.kernel_size
    if factor.kind == "spatial":
        assert factor.ranks[0] is not None
        return SpatialConv(*sizes, factor.ranks[0], first=factor.first, bias=bias, **_options(layer))  # type: ignore[arg-type]
    return Tucker2Conv(*sizes, factor.ranks, bias=bias, **_options(layer))  # type: ignore[arg-type]


def _options(layer: nn.Conv1d | nn.Conv2d) -> dict[str, Any]:
    return {"stride": layer.stride, "padding": _padding(layer), "dilation": layer.dilation}


def _padding(layer: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    """As numbers; `_reversed_padding_repeated_twice` has both ends of each axis, the last axis first."""
    if not isinstance(layer.padding, str):
        return layer.padding
    return tuple(layer._reversed_padding_repeated_twice[::-2])


def _as(layer: Dense, made: LowRank) -> LowRank:
    """On the device, in the dtype and in the mode of ``layer``, and trainable as it is."""
    made = made.to(layer.weight.device, layer.weight.dtype).train(layer.training)
    return made.requires_grad_(layer.weight.requires_grad)


def _replace(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Wherever a module is a child, under whatever name."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in made:
                module._modules[name] = made[child]
