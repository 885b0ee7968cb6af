"""Refit every layer of a pruned model, from its own inputs to the dense model's outputs, in order from the input.

The layers that read removed channels lost what those told them; the kept ones can stand in for most of it (He et al.
2017, "Channel pruning for accelerating very deep neural networks", section 3.1). All batches go through both models in
lockstep, so that each layer is fitted to what the layers before it, refitted already, give. What a layer adds to a
residual stream is fitted to what the dense stream has more than the pruned one, so that errors do not accumulate (as in
ThiNet's and He's sequential reconstruction, section 3.3 there); before a ReLU, targets below zero may be missed below
zero (Zhang et al. 2016, "Accelerating very deep convolutional networks", section 3.2).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.gram import MAX_INPUTS, traced
from compress.labels import Array
from compress.plan import PrunePlan
from compress.recover.pair import Pair
from compress.recover.regression import CAUTIOUS, RIDGES, Method, Regression, Rows
from compress.sandbox import untouched, visible_operators
from compress.sites import Key, Site
from compress.trace import ExampleInputs

MAX_ROWS = 32768  # of one layer, or eight for each input where that is more
ROWS_PER_INPUT = 8


@dataclass(frozen=True)
class LayerError:
    """Squared error of what a layer gives, against the dense model, as a part of its variance, on held-out data.

    ``method`` says what was kept; empty where nothing helped.
    """

    name: str
    before: float
    after: float
    method: str
    scarce: bool = False


def refit(
    model: nn.Module,
    dense: nn.Module,
    plan: PrunePlan,
    inputs: Sequence[ExampleInputs],
    choose: Callable[[Site, Sequence[int]], Sequence[str]],
    *,
    seed: int = 0,
) -> list[LayerError]:
    """Refit the layers of ``model``, which ``plan`` made of ``dense``, in place.

    Every batch's activations at the present layer are in memory at once, in both models.

    Args:
        inputs: batches of the models' inputs.
        choose: which of the methods "bias" and "least_squares" may be used for a site, given the outputs' references.

    Raises:
        CalibrationError: activations are not finite, or the operators depend on the data.
    """
    removed: dict[str, list[tuple[int, Array]]] = {}
    for (name, axis), indices in plan.removed().items():
        removed.setdefault(name, []).append((axis, indices))
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(dense).items()}
    tensors, generator = _tensors(model), torch.Generator().manual_seed(seed)
    small, large = list(traced(model, inputs)), list(traced(dense, inputs))
    report = []
    with torch.no_grad(), untouched(dense), visible_operators():
        pairs = [
            Pair((model, a), (dense, b), batch, number)
            for number, ((batch, a), (_, b)) in enumerate(zip(small, large, strict=True))
        ]
        order = [key for key in pairs[0].order if all(key in pair.order for pair in pairs)]
        lands = {key: all(pair.lands[key] for pair in pairs) for key in order}
        outputs = [ref.id for ref in small[0][1].outputs]
        try:
            for side in (side for pair in pairs for side in pair.sides):
                side.start(lands)
            for key in order:
                for side in (side for pair in pairs for side in pair.sides):
                    side.advance(key)
                site = pairs[0].small.sites[key]
                kept = pairs[0].large.sites[key].kept_outputs(removed.get(key[0], ()), shapes[key[0]])
                methods = choose(site, outputs)
                if methods and _suitable(pairs, key, tensors[key[0]]):
                    report.append(
                        _refit_layer(pairs, key, lands[key], torch.from_numpy(kept), tensors, methods, generator)
                    )
                    for pair in pairs:
                        pair.small.renew(key)
                for side in (side for pair in pairs for side in pair.sides):
                    side.release(key)
        finally:
            for side in (side for pair in pairs for side in pair.sides):
                side.abandon()
    return report


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _suitable(pairs: Sequence[Pair], key: Key, weight: Tensor) -> bool:
    sides = [side for pair in pairs for side in pair.sides]
    small = pairs[0].small.sites[key].num_inputs <= MAX_INPUTS
    return small and weight.is_floating_point() and all(side.unchanged(key) for side in sides)


def _refit_layer(
    pairs: Sequence[Pair],
    key: Key,
    lands: bool,
    kept: Tensor,
    tensors: Mapping[str, Tensor],
    allowed: Sequence[str],
    generator: torch.Generator,
) -> LayerError:
    """Solve for one layer from all batches; what helps is written into the model."""
    side = pairs[0].small
    site, intercept = side.sites[key], side.landings[key].intercept
    weight = tensors[site.parameter]
    shift = None if intercept is None else tensors[intercept[0]]
    constant = shift if intercept is not None and intercept[0] == site.bias else None
    total = sum(pair.small.sites[key].num_rows(pair.small.source(key)) for pair in pairs)
    share = min(1.0, max(MAX_ROWS, ROWS_PER_INPUT * site.num_inputs) / max(total, 1))
    rows = [_rows(pair, key, lands, kept, constant, share, generator) for pair in pairs]
    regression = Regression(site.matrix(weight).double().cpu(), rows, free=shift is not None)
    least = CAUTIOUS if regression.scarce else 0.0
    methods = [Method()] if shift is not None and "bias" in allowed else []
    methods += [Method(ridge) for ridge in RIDGES if ridge >= least] if "least_squares" in allowed else []
    matrix, method, before, after = regression.best(methods)
    if method is not None:
        site.write(weight, matrix[:, :, :-1].to(weight))
        if shift is not None and intercept is not None:
            shift.detach().add_(matrix[:, :, -1].reshape(shift.shape).to(shift), alpha=intercept[1])
    name = site.parameter.removesuffix(".weight")
    return LayerError(name, before, after, "" if method is None else str(method), regression.scarce)


def _rows(
    pair: Pair,
    key: Key,
    lands: bool,
    kept: Tensor,
    constant: Tensor | None,
    share: float,
    generator: torch.Generator,
) -> Rows:
    """What enters the site of the pruned model, and what it should give, at the same positions of both."""
    small, large = pair.small, pair.large
    here, there = small.sites[key], large.sites[key]
    source = small.source(key)
    positions = here.positions(source, math.ceil(here.num_rows(source) * share), generator)
    found = here.outputs(small.output(key), positions)

    def at(value: Tensor, site: Site, chosen: Tensor | None = None) -> Tensor:
        rows = site.outputs(value, positions)
        flat = rows.permute(1, 0, 2).reshape(rows.shape[1], -1)
        flat = flat if chosen is None else flat[:, chosen.to(flat.device)]
        return flat.reshape(len(flat), here.groups, -1).permute(1, 0, 2)

    zero = sign = None
    if lands:
        mine, scale = (at(value, here) for value in small.landed(key))
        theirs = at(large.landed(key)[0], there, kept)
        targets = found + torch.where(scale == 0, 0.0, (theirs - mine) / scale)
        if small.landings[key].rectified:
            zero, sign = found - torch.where(scale == 0, 0.0, mine / scale), scale.sign()
    else:
        targets = at(large.output(key), there, kept)
    if constant is not None:  # the operator adds it to what the rows give
        own = constant.detach().reshape(here.groups, 1, -1)
        targets, zero = targets - own, None if zero is None else zero - own
    return Rows(here.rows(source, positions), targets, zero, sign)
