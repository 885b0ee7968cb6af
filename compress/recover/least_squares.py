"""Refit every layer of a pruned model, from its own inputs to the dense model's outputs, in order from the input.

The layers that read removed channels lost what those told them; the kept ones can stand in for most of it (He et al.
2017, "Channel pruning for accelerating very deep neural networks", section 3.1). All batches go through both models in
lockstep, so that each layer is fitted to what the layers before it, refitted already, give. What a layer adds to a
residual stream is fitted to what the dense stream has more than the pruned one, so that errors do not accumulate (as in
ThiNet's and He's sequential reconstruction, section 3.3 there); before a ReLU, targets below zero may be missed below
zero (Zhang et al. 2016, "Accelerating very deep convolutional networks", section 3.2). A layer that feeds another one
alone is refitted once more together with that (see :mod:`compress.recover.joint`).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.gram import MAX_INPUTS, traced
from compress.labels import Array
from compress.plan import PrunePlan
from compress.recover.heap import trim_heap
from compress.recover.joint import refit_chain
from compress.recover.layer import Layer, LayerError
from compress.recover.pair import Pair
from compress.recover.weights import tensors_of
from compress.sandbox import quick_operators, untouched, visible_operators
from compress.sites import Key, Site
from compress.trace import ExampleInputs

Count = Callable[[str, int], float]


def refit(
    model: nn.Module,
    dense: nn.Module,
    plan: PrunePlan,
    inputs: Sequence[ExampleInputs],
    choose: Callable[[Site, Sequence[int]], Sequence[str]],
    *,
    seed: int = 0,
    origins: Mapping[str, str] | None = None,
    count: Count | None = None,
) -> list[LayerError]:
    """Refit the layers of ``model``, which ``plan`` made of ``dense``, in place.

    Every batch's activations at the present layer are in memory at once, in both models.

    Args:
        inputs: batches of the models' inputs.
        choose: which of the methods "bias" and "least_squares" may be used for a site, given the outputs' references.
        origins: the weight of ``dense`` whose outputs a weight of ``model`` gives, where its name differs.
        count: what squared errors count of the layer with a parameter on a batch, by its number; 1 where None.

    Raises:
        CalibrationError: activations are not finite, or the operators depend on the data.
    """
    removed: dict[str, list[tuple[int, Array]]] = {}
    for (name, axis), indices in plan.removed().items():
        removed.setdefault(name, []).append((axis, indices))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(dense).items()}
    tensors, generator = tensors_of(model), torch.Generator().manual_seed(seed)
    small, large = list(traced(model, inputs)), list(traced(dense, inputs))
    report = []
    with torch.no_grad(), untouched(dense), visible_operators():
        pairs = [
            Pair((model, a), (dense, b), batch, number, origins)
            for number, ((batch, a), (_, b)) in enumerate(zip(small, large, strict=True))
        ]
        order = [key for key in pairs[0].order if all(key in pair.order for pair in pairs)]
        lands = {key: all(pair.lands[key] for pair in pairs) for key in order}
        outputs = [ref.id for ref in small[0][1].outputs]
        chains = _chains(pairs, order)
        waiting = set(chains.values())
        try:
            for pair in pairs:
                pair.start(lands)
            for key in order:
                for side in (side for pair in pairs for side in pair.sides_at(key)):
                    side.advance(key)
                site = pairs[0].small.sites[key]
                methods = [] if key in pairs[0].inner else choose(site, outputs)
                if methods and _suitable(pairs, key, tensors[key[0]]):
                    name = pairs[0].large.sites[key].parameter
                    kept = pairs[0].large.sites[key].kept_outputs(removed.get(name, ()), shapes[name])
                    counts = [] if count is None else [count(key[0], number) for number in range(len(pairs))]
                    layer = Layer(pairs, key, lands[key], torch.from_numpy(kept), tensors, generator, counts)
                    for pair in pairs:
                        pair.small.check(key)
                    with quick_operators():
                        error = layer.refit(methods)
                        if key in chains and "least_squares" in methods:
                            error = refit_chain(layer, error, methods)
                        report.append(error)
                for pair in pairs:
                    if key not in pair.inner:
                        pair.large.release(key)
                    if key in chains:  # what fed it waited for it
                        pair.small.release(chains[key])
                    if key not in waiting:
                        pair.small.release(key)
                trim_heap()
        finally:
            for side in (side for pair in pairs for side in pair.sides):
                side.abandon()
    return report


def _suitable(pairs: Sequence[Pair], key: Key, weight: Tensor) -> bool:
    if pairs[0].small.sites[key].num_inputs > MAX_INPUTS or not weight.is_floating_point():
        return False
    return all(_comparable(pair, key) for pair in pairs)


def _comparable(pair: Pair, key: Key) -> bool:
    """Whether inputs are as they were, and rows are alike: what is mixed over positions has a row for each channel."""
    rows = {side.sites[key].num_rows(side.source(key)) for side in pair.sides_at(key)}
    return len(rows) == 1 and all(side.unchanged(key) for side in pair.sides_at(key))


def _chains(pairs: Sequence[Pair], order: Sequence[Key]) -> dict[Key, Key]:
    """The layers that are fed by one other layer alone, and that layer.

    Not the two factors of one layer: the first was the best for the second when both were made, and 1 % less error of
    the outputs (CIFAR ResNets) takes as long as all else.
    """
    chains, known = pairs[0].small.chains, set(order) - pairs[0].inner
    return {
        second: chain.first
        for second, chain in chains.items()
        if {second, chain.first} <= known and all(second in pair.small.chains for pair in pairs)
    }
