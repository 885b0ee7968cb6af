"""Which layers are factorised, and at which ranks: one budget, spent where it costs the outputs least."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from compress.errors import BudgetError
from compress.factorize.options import Layer, Option

Choice = Mapping[str, Option]


def cost(thing: Layer | Option, metric: str) -> int:
    """In MACs or parameters."""
    return int(getattr(thing, metric))


def within_budget(layers: Sequence[Layer], metric: str, total: int, fraction: float) -> Choice:
    """An option for some layers, so that ``fraction`` of the ``total`` cost of the model is not exceeded.

    Greedy by error per saved cost along the lower convex hulls of the layers' options, which is best but for the last
    step; that goes no further than it must, and what is then left of the budget is given back where it helps most.

    Raises:
        BudgetError: too little can be saved; says how little can be reached.
    """
    allowed = int(total * fraction)
    options = {layer.name: _pareto(layer, metric) for layer in layers}
    smallest = total - sum(cost(la, metric) - cost(options[la.name][-1], metric) for la in layers if options[la.name])
    if smallest > allowed:
        reached = smallest / total
        raise BudgetError(
            f"factorisation alone brings {metric} down to {reached:.4g} of the model, not to {fraction:.4g}: allow "
            "more, add methods, or prune",
            reached,
        )
    chosen: dict[str, Option] = {}
    present = total
    for _, layer, option in sorted(_steps(layers, options, metric), key=lambda step: step[0]):
        if present <= allowed:
            break
        before = cost(chosen.get(layer.name, layer), metric)
        if present - before + cost(option, metric) <= allowed:
            option = _closest(options[layer.name], metric, allowed - present + before)
        chosen[layer.name] = option
        present += cost(option, metric) - before
    return _given_back(layers, options, chosen, metric, allowed - present)


def by_energy(layers: Sequence[Layer], energy: float, metric: str = "macs") -> Choice:
    """Each layer by itself: the cheapest option that keeps this part of the second moment of its outputs.

    What costs nothing by the metric (looking up embeddings takes no MACs) is compared by parameters.
    """
    chosen = {}
    for layer in layers:
        unit = metric if cost(layer, metric) else "params"
        good = [o for o in _pareto(layer, unit) if o.error <= (1 - energy) * layer.energy]
        if good:
            chosen[layer.name] = good[-1]  # they fall in cost
    return chosen


def _pareto(layer: Layer, metric: str) -> list[Option]:
    """The options that nothing cheaper (nor the dense layer) equals, from the dearest to the cheapest."""
    kept: list[Option] = []
    cheaper = (o for o in layer.options if cost(o, metric) < cost(layer, metric))
    for option in sorted(cheaper, key=lambda o: (cost(o, metric), o.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept[::-1]


def _steps(
    layers: Sequence[Layer], options: Mapping[str, Sequence[Option]], metric: str
) -> Iterable[tuple[float, Layer, Option]]:
    """Along each hull, from the dense layer down: error per saved cost, which grows from step to step."""
    for layer in layers:
        hull: list[tuple[int, float, Option | None]] = [(cost(layer, metric), 0.0, None)]
        for option in options[layer.name]:
            point = cost(option, metric), layer.counts * option.error, option
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
                hull.pop()
            hull.append(point)
        for above, below in pairwise(hull):
            assert below[2] is not None
            yield _slope(above, below), layer, below[2]


def _slope(above: tuple[int, float, Option | None], below: tuple[int, float, Option | None]) -> float:
    return (below[1] - above[1]) / (above[0] - below[0])


def _closest(options: Sequence[Option], metric: str, allowed: int) -> Option:
    """The least error at this cost at most."""
    return min((o for o in options if cost(o, metric) <= allowed), key=lambda o: o.error)


def _given_back(
    layers: Sequence[Layer],
    options: Mapping[str, Sequence[Option]],
    chosen: dict[str, Option],
    metric: str,
    slack: int,
) -> Choice:
    own = {layer.name: layer for layer in layers}
    while True:
        better: list[tuple[float, str, Option | None, int]] = []
        for name, option in chosen.items():
            whole, room = cost(own[name], metric), cost(option, metric) + slack
            found = None if whole <= room else _closest(options[name], metric, room)
            gain = own[name].counts * (option.error - (0.0 if found is None else found.error))
            spent = (whole if found is None else cost(found, metric)) - cost(option, metric)
            better.append((gain, name, found, spent))
        gain, name, replacement, spent = max(better, key=lambda b: b[0], default=(0.0, "", None, 0))
        if gain <= 0:
            return chosen
        slack -= spent
        if replacement is None:
            del chosen[name]
        else:
            chosen[name] = replacement
