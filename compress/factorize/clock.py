"""Latency as the budget: thin layers are timed on this machine, and the whole model is measured until it meets it.

Multiply-accumulates are not seconds: two thin convolutions can take longer than the one that they stand for. Each
layer is timed as it is and as what it could become, at some ranks; what is not faster is no option.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from compress.cost import own_seconds, relative_latency
from compress.errors import BudgetError, PruneError
from compress.factorize.options import Layer, Option
from compress.factorize.plan import FactorPlan
from compress.factorize.selection import Choice, within_budget
from compress.factorize.surgery import insert, weight_of, without_values
from compress.speed import meet_latency
from compress.surgery import copied
from compress.timing import seconds_of_layer
from compress.trace import ExampleInputs

RANKS = 8  # of each kind of factorisation that are timed
VECTOR = 8  # ranks above are multiples of it: what processors like
NANO = 1e-9  # seconds: the unit of costs, which are whole numbers


class _OfItself(nn.Module):
    """An attention as a layer of one input."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output

    def extra_repr(self) -> str:
        return f"num_heads={self.attention.num_heads}, batch_first={self.attention.batch_first}"


def timed(
    model: nn.Module, layers: Sequence[Layer], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[Layer], dict[str, str]]:
    """The layers with what they and some of their options take, those options alone that are faster; and by parameter
    why some have none.

    Args:
        shapes: of what each layer reads; those of none (a table: looking up takes no time that a thin one could save)
            are left out.
    """
    found = []
    for layer in layers:
        if layer.name not in shapes:
            continue
        owner, shape = model.get_submodule(layer.name), shapes[layer.name]
        weight, attends = weight_of(owner), isinstance(owner, nn.MultiheadAttention)
        # a layer of torch.nn says by its repr what it is, which a user's own may not
        plain = without_values(owner, layer.factor(layer.options[0])).merge()
        dense = round(seconds_of_layer(_OfItself(plain) if attends else plain, shape, weight) / NANO)
        faster = []
        for option in _some(layer.options):
            made: nn.Module = without_values(owner, layer.factor(option))
            nanoseconds = round(seconds_of_layer(_OfItself(made) if attends else made, shape, weight) / NANO)
            if nanoseconds < dense:
                faster.append(replace(option, latency=nanoseconds))
        found.append(replace(layer, latency=dense, options=tuple(faster)))
    return found, {f"{layer.name}.weight": "it is faster as it is" for layer in found if not layer.options}


def within_latency(
    model: nn.Module,
    example_inputs: ExampleInputs,
    layers: Sequence[Layer],
    fraction: float,
    dense: nn.Module | None = None,
) -> tuple[Choice, float]:
    """The choice whose measured latency is at most ``fraction`` of the dense model's, and that latency.

    Args:
        layers: from :func:`timed`.
        dense: the model that it is compared with, where that is another one.

    Raises:
        BudgetError: the fastest is measured above; says how much remains.
        PruneError: no layer gets faster.
    """
    if fraction >= 1:
        return {}, 1.0
    if not any(layer.options for layer in layers):
        raise PruneError("on this machine no factorisation is faster than the layer that it stands for: prune instead")
    total = round(own_seconds(model, example_inputs) / NANO)
    whole = total if dense is None else round(own_seconds(dense, example_inputs) / NANO)
    measured: dict[frozenset[tuple[str, Option]], float] = {}

    def choose(aim: float) -> Choice:
        try:
            return within_budget(layers, "latency", total, min(aim * whole / total + 1e-6, 1.0))
        except BudgetError as error:
            raise BudgetError(str(error), (error.smallest or 0.0) * total / whole) from None

    def measure(choice: Choice) -> float:
        key = frozenset(choice.items())
        if key not in measured:
            made = copied(model)
            plan = FactorPlan(tuple(layer.factor(choice[layer.name]) for layer in layers if layer.name in choice))
            insert(made, plan, empty=True)
            measured[key] = relative_latency(made, dense or model, example_inputs)
        return measured[key]

    choice = meet_latency(choose, measure, fraction)
    return choice, measured[frozenset(choice.items())]


def _some(options: Sequence[Option]) -> list[Option]:
    """Of each kind some ranks, spread evenly, of all that differ in one rank alone."""
    families: dict[tuple[object, ...], list[Option]] = {}
    for option in options:
        families.setdefault((option.kind, option.first, *_fixed(option)), []).append(option)
    return [family[i] for family in families.values() for i in _spread([_free(option) for option in family])]


def _fixed(option: Option) -> tuple[int | None, ...]:
    """The ranks that a family has in common: the inputs' side where both sides have one, and which side has none."""
    if len(option.ranks) == 1 or None in option.ranks:
        return tuple(None if rank is None else 0 for rank in option.ranks)
    return option.ranks[:1]


def _free(option: Option) -> int:
    return next(rank for rank in reversed(option.ranks) if rank is not None)


def _spread(ranks: Sequence[int]) -> list[int]:
    """Positions of some ranks, of multiples of a vector where there are enough of them."""
    round_ones = [i for i, rank in enumerate(ranks) if rank % VECTOR == 0]
    places = round_ones if len(round_ones) >= RANKS else list(range(len(ranks)))
    chosen = np.linspace(0, len(places) - 1, min(RANKS, len(places))).round().astype(int)
    return sorted({places[i] for i in chosen.tolist()})
