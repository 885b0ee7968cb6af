"""Choose what goes: the least important channels, in lumps that keep the model consistent, until the budget is met."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from compress.channels import ChannelGraph
from compress.errors import BudgetError, PruneError
from compress.labels import Array
from compress.removal import Removal, by_score

Price = Callable[[Array], float]

FLOOR = 0.1  # no axis falls below this part of its length: PruningBench's "10 % group-wise protection"
LOWER_FLOORS = (0.05, 0.02, 0.0)  # for a budget that cannot be reached above it
SCOPES = ("global", "uniform")
MAX_SKIPS = 11  # large steps that may be left out to come closer to the budget
CLOSE_ENOUGH = 0.001  # of the budget
REPRICE = 0.005  # of the dense cost: when so much is gone, what each lump saves is worked out anew


@dataclass(frozen=True)
class Chunks:
    """The removal order: chunk ``i`` removes lump ``lump[i]`` ``times[i]`` times, shape (chunks,) both.

    Chunks of one lump are in order, whatever comes between them.
    """

    lump: Array
    times: Array

    def __len__(self) -> int:
        return len(self.lump)

    def __getitem__(self, chosen: slice | npt.NDArray[Any]) -> "Chunks":
        return Chunks(self.lump[chosen], self.times[chosen])

    def __add__(self, other: "Chunks") -> "Chunks":
        return Chunks(np.concatenate([self.lump, other.lump]), np.concatenate([self.times, other.times]))

    def per_lump(self) -> dict[int, int]:
        """How often each lump is removed in all."""
        total = np.bincount(self.lump, weights=self.times).astype(np.int64)
        return {int(lump): int(total[lump]) for lump in np.flatnonzero(total)}


@dataclass(frozen=True)
class Selection:
    """Units to remove by group index, how often each lump was taken, and what part of any axis stays at least."""

    units: Mapping[int, Array]
    lumps: Mapping[int, int]
    floor: float = FLOOR

    def kept(self, sizes: Array) -> Array:
        """How many units of each group stay, of ``sizes``."""
        left = sizes.copy()
        for group, units in self.units.items():
            left[group] -= len(units)
        return left


@dataclass(frozen=True)
class SelectOptions:
    """``scope``: "global" spends the budget where it costs least importance, "uniform" takes the same part of every
    group. ``round_to``: widths become multiples of it, or of what ``multiples`` has for their lump. ``min_channels``:
    no axis gets shorter. ``stepwise``: the price falls in steps (seconds do), so that what a lump saves is the mean
    over half of what is left of it."""

    scope: str = "global"
    round_to: int = 1
    min_channels: int = 1
    stepwise: bool = False
    multiples: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise PruneError(f"scope={self.scope!r} is unknown: choose one of {', '.join(SCOPES)}")
        if not isinstance(self.round_to, int):
            raise PruneError(f"round_to={self.round_to!r} is no width: give a whole number, such as 8, or 'auto'")
        if self.round_to < 1:
            raise PruneError(f"round_to={self.round_to} must be at least 1")
        if self.min_channels < 1:
            raise PruneError(f"min_channels={self.min_channels} must be at least 1")


def select(
    graph: ChannelGraph,
    removals: Sequence[Removal],
    price: Price,
    target: float,
    options: SelectOptions,
) -> Selection:
    """The shortest prefix of the removal order whose cost is at most ``target``.

    No axis falls below :data:`FLOOR` of its length, unless the target cannot be reached otherwise.

    Args:
        removals: of each group.
        price: what a model costs of which so many units of each group are kept, as a fraction of the dense one; falls
            as more is removed.
        target: fraction in (0, 1].

    Raises:
        BudgetError: the target is below what ``min_channels`` allows; says the smallest that can be reached.
    """

    def cost(selection: Selection) -> float:
        return price(selection.kept(graph.sizes))

    order = [removal.order for removal in removals]
    every = _in_order(graph, removals, price, options)
    for floor in (FLOOR, *LOWER_FLOORS):
        chunks = _feasible(graph, every, options, floor)

        def after(taken: Chunks, floor: float = floor) -> Selection:
            return replace(_selection(graph, order, taken.per_lump()), floor=floor)

        if target >= 1:
            return after(chunks[:0])
        smallest = cost(after(chunks))
        if smallest <= target:
            break
    else:
        raise BudgetError(
            f"the budget {target:.3g} cannot be reached: at least {smallest:.3g} remains with min_channels="
            f"{options.min_channels} and round_to={options.round_to}; "
            "raise the budget, protect less, or allow inexact groups",
            smallest,
        )
    number = _shortest(chunks, 0, lambda taken: cost(after(taken)) <= target)
    best = after(chunks[:number])
    highest, fixed = cost(best), chunks[:0]
    for _ in range(MAX_SKIPS):
        if target - highest <= CLOSE_ENOUGH * target:
            break
        # the last step was a large one: leave it out, and let finer ones close the gap
        fixed, last, chunks = fixed + chunks[: number - 1], chunks.lump[number - 1], chunks[number:]
        chunks = chunks[chunks.lump != last]
        if not len(chunks) or cost(after(fixed + chunks)) > target:
            break
        number = _shortest(fixed + chunks, len(fixed), lambda taken: cost(after(taken)) <= target) - len(fixed)
        selection = after(fixed + chunks[:number])
        if (reached := cost(selection)) > highest:
            best, highest = selection, reached
    return best


def _shortest(chunks: Chunks, least: int, holds: Callable[[Chunks], bool]) -> int:
    """How many chunks it takes until ``holds``, which is false for ``least`` of them and true for all."""
    low, high = least, len(chunks)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(chunks[:middle]) else (middle, high)
    return high


def smallest(graph: ChannelGraph, price: Price) -> float:
    """The lowest cost that the floors allow when units of a group are worth the same; arguments as for `select`."""
    removals = [by_score(group, np.ones(group.num_units)) for group in graph.groups]
    options = SelectOptions()
    chunks = _feasible(graph, _in_order(graph, removals, price, options), options, FLOOR)
    return price(_selection(graph, [removal.order for removal in removals], chunks.per_lump()).kept(graph.sizes))


def _in_order(graph: ChannelGraph, removals: Sequence[Removal], price: Price, options: SelectOptions) -> Chunks:
    """All chunks; the next is always the one that loses least for what it saves by then.

    What each lump saves is worked out anew whenever a part of the cost is gone, as its neighbours have shrunk; except
    for losses that are relative to the dense model.
    """
    found = [_chunks(graph, index, removals, options) for index in range(len(graph.lumps))]
    left = Chunks(*(np.concatenate([getattr(c, name) for c, _ in found]) for name in ("lump", "times")))
    losses = np.concatenate([slopes for _, slopes in found])
    if options.scope == "uniform":
        return left[np.argsort(losses, kind="stable")]
    kept, ordered = graph.sizes.copy(), left[:0]
    part = np.inf if all(removal.relative for removal in removals) else REPRICE
    while len(left):
        savings = _savings(graph, price, kept, options)[left.lump]
        # what saves nothing (a head that runs in training only) goes last
        keys = np.divide(losses, savings, out=np.full(len(left), np.inf), where=savings > 0)
        order = np.lexsort((losses, keys))  # neither falls within a lump, and equal ones stay in order
        number = int(np.searchsorted(np.cumsum((savings * left.times)[order]), part)) + 1
        next_ones = left[order[:number]]
        for index, times in next_ones.per_lump().items():
            for g, n in graph.lumps[index].units.items():
                kept[g] = max(0, kept[g] - n * times)
        rest = np.sort(order[number:])
        ordered, left, losses = ordered + next_ones, left[rest], losses[rest]
    return ordered


def _savings(graph: ChannelGraph, price: Price, kept: Array, options: SelectOptions) -> npt.NDArray[np.float64]:
    """What each lump saves when it is the next to go."""
    now, saved = price(kept), []
    for lump in graph.lumps:
        groups, units = list(lump.units), np.array(list(lump.units.values()))
        times = max(1, int((kept[groups] // units).min() + 1) // 2) if options.stepwise else 1
        less = kept.copy()
        less[groups] = np.maximum(less[groups] - times * units, 0)
        saved.append((now - price(less)) / times)
    return np.array(saved)


def _chunks(
    graph: ChannelGraph, index: int, removals: Sequence[Removal], options: SelectOptions
) -> tuple[Chunks, npt.NDArray[np.float64]]:
    """The chunks of one lump in order, each with its loss for every time that the lump goes; those never fall.

    Where they would, the chunks up to there are worth more together than the first of them alone: they share one loss.
    """
    lump = graph.lumps[index]
    available = min(int(graph.sizes[g]) // n for g, n in lump.units.items())
    points = _widths(graph, index, available, options.multiples.get(index, options.round_to))
    times = np.diff(points)
    if options.scope == "uniform":
        slopes = points[1:] / max(available, 1)
    else:
        lost = sum((np.diff(removals[g].losses[points * n]) for g, n in lump.units.items()), np.zeros(len(times)))
        slopes = _never_falling(lost / times, times)
    return Chunks(np.full(len(times), index), times), slopes


def _never_falling(slopes: npt.NDArray[np.float64], weights: Array) -> npt.NDArray[np.float64]:
    """The weighted isotonic regression of ``slopes``: neighbours that fall share their mean."""
    if (np.diff(slopes) >= 0).all():
        return slopes
    return np.asarray(isotonic_regression(slopes, weights=weights).x)


def _widths(graph: ChannelGraph, lump: int, available: int, round_to: int) -> Array:
    """How often the lump may be gone, from 0: where widths that it alone decides are multiples of ``round_to``."""
    units = graph.lumps[lump].units
    lengths = graph.lengths
    gone = np.arange(available + 1, dtype=np.int64)
    for row in range(lengths.matrix.shape[0]) if round_to > 1 else ():
        part = slice(lengths.matrix.indptr[row], lengths.matrix.indptr[row + 1])
        groups, counts = lengths.matrix.indices[part], lengths.matrix.data[part]
        if len(groups) and set(groups.tolist()) <= set(units):
            length = int(lengths.fixed[row] + counts @ graph.sizes[groups])
            taken = int(sum(c * units[int(g)] for g, c in zip(groups, counts, strict=True)))
            gone = gone[(gone == 0) | ((length - gone * taken) % round_to == 0)]
    return gone


def _feasible(graph: ChannelGraph, chunks: Chunks, options: SelectOptions, floor: float) -> Chunks:
    """The chunks that leave every axis long enough; once a chunk does not fit, nor do later ones of its lump."""
    length = graph.lengths.fixed + graph.lengths.matrix @ graph.sizes
    least = np.minimum(length, np.maximum(options.min_channels, np.ceil(floor * length))).astype(np.int64)
    removals = np.zeros((len(graph.sizes), len(graph.lumps)), dtype=np.int64)
    for index, lump in enumerate(graph.lumps):
        removals[list(lump.units), index] = list(lump.units.values())
    # what each lump takes of each axis, and of each group, and how much of that may go
    taken = np.concatenate([graph.lengths.matrix @ removals, removals])
    room = np.concatenate([length - least, graph.sizes])
    # one lump alone can go so often:
    alone = np.where(taken > 0, room[:, None] // np.maximum(taken, 1), np.iinfo(np.int64).max).min(axis=0)
    sums = _sums_within(chunks)
    chunks = chunks[sums <= alone[chunks.lump]]
    # and where all together take no more than there is, that is all
    scarce = np.flatnonzero(taken @ np.bincount(chunks.lump, chunks.times, len(alone)).astype(np.int64) > room)
    if not len(scarce):
        return chunks
    taken, room, finished, fits = taken[scarce], room[scarce], set[int](), np.ones(len(chunks), dtype=bool)
    touched = [np.flatnonzero(column) for column in taken.T]
    for position, (index, times) in enumerate(zip(chunks.lump.tolist(), chunks.times.tolist(), strict=True)):
        rows = touched[index]
        left = room[rows] - times * taken[rows, index]
        if index in finished or (left < 0).any():
            finished.add(index)
            fits[position] = False
        else:
            room[rows] = left
    return chunks[fits]


def _sums_within(chunks: Chunks) -> Array:
    """How often the lump of each chunk is gone after it."""
    order = np.argsort(chunks.lump, kind="stable")
    total = np.cumsum(chunks.times[order])
    lumps = chunks.lump[order]
    first = np.flatnonzero(np.r_[True, lumps[1:] != lumps[:-1]]) if len(lumps) else np.zeros(0, dtype=np.int64)
    before = np.repeat(total[first] - chunks.times[order][first], np.diff(np.r_[first, len(lumps)]))
    sums = np.empty_like(total)
    sums[order] = total - before
    return sums


def _selection(graph: ChannelGraph, order: Sequence[Array], times: Mapping[int, int]) -> Selection:
    counts: dict[int, int] = {}
    for index, number in times.items():
        for g, n in graph.lumps[index].units.items():
            counts[g] = counts.get(g, 0) + n * number
    return Selection({g: np.sort(order[g][:count]) for g, count in counts.items()}, dict(times))
