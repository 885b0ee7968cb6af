"""Choose what goes: the least important channels, in lumps that keep the model consistent, until the budget is met."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.channels import ChannelGraph
from compress.errors import BudgetError, PruneError
from compress.labels import Array
from compress.removal import Removal, by_score

Price = Callable[[Array], float]

FLOOR = 0.1  # no axis falls below this part of its length: PruningBench's "10 % group-wise protection"
SCOPES = ("global", "uniform")
MAX_SKIPS = 11  # large steps that may be left out to come closer to the budget
CLOSE_ENOUGH = 0.001  # of the budget
REPRICE = 0.005  # of the dense cost: when so much is gone, what each lump saves is worked out anew


@dataclass(frozen=True)
class Chunk:
    """Remove lump ``lump`` ``times`` times; chunks of one lump are taken in order."""

    lump: int
    times: int


@dataclass(frozen=True)
class Selection:
    """Units to remove by group index, and how often each lump was taken."""

    units: Mapping[int, Array]
    lumps: Mapping[int, int]


@dataclass(frozen=True)
class SelectOptions:
    """``scope``: "global" spends the budget where it costs least importance, "uniform" takes the same part of every
    group. ``round_to``: widths become multiples of it. ``min_channels``: no axis gets shorter.
    ``exact_steps``: the cost is exact, so that the last step may be chosen by it (a measured latency is not)."""

    scope: str = "global"
    round_to: int = 1
    min_channels: int = 1
    exact_steps: bool = True

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise PruneError(f"scope={self.scope!r} is unknown: choose one of {', '.join(SCOPES)}")
        if not isinstance(self.round_to, int):
            raise PruneError(f"round_to={self.round_to!r} is not there yet: give a whole number, such as 8")
        if self.round_to < 1:
            raise PruneError(f"round_to={self.round_to} must be at least 1")
        if self.min_channels < 1:
            raise PruneError(f"min_channels={self.min_channels} must be at least 1")


def select(
    graph: ChannelGraph,
    removals: Sequence[Removal],
    price: Price,
    cost: Callable[[Selection], float],
    target: float,
    options: SelectOptions,
) -> Selection:
    """The shortest prefix of the removal order whose cost is at most ``target``.

    Args:
        removals: of each group.
        price: what a model costs of which so many units of each group are kept, as a fraction of the dense one.
        cost: the exact cost of a selection, as a fraction of the dense model's; falls as more is removed.
        target: fraction in (0, 1].

    Raises:
        BudgetError: the target is below what the floors allow; says the smallest that can be reached.
    """
    order = [removal.order for removal in removals]
    chunks = list(_in_order(graph, removals, price, options))

    def after(taken: Sequence[Chunk]) -> Selection:
        return _selection(graph, order, _times(taken))

    if target >= 1:
        return after([])
    smallest = cost(after(chunks))
    if smallest > target:
        raise BudgetError(
            f"the budget {target:.3g} cannot be reached: at least {smallest:.3g} remains with min_channels="
            f"{options.min_channels}, round_to={options.round_to} and a floor of {FLOOR:.0%} an axis; "
            "raise the budget, protect less, or allow inexact groups"
        )
    number = _shortest(chunks, 0, lambda taken: cost(after(taken)) <= target)
    best = after(chunks[:number])
    if not options.exact_steps:
        return best
    highest, fixed = cost(best), list[Chunk]()
    for _ in range(MAX_SKIPS):
        if target - highest <= CLOSE_ENOUGH * target:
            break
        # the last step was a large one: leave it out, and let finer ones close the gap
        fixed += chunks[: number - 1]
        chunks = [chunk for chunk in chunks[number:] if chunk.lump != chunks[number - 1].lump]
        if not chunks or cost(after([*fixed, *chunks])) > target:
            break
        number = _shortest([*fixed, *chunks], len(fixed), lambda taken: cost(after(taken)) <= target) - len(fixed)
        selection = after([*fixed, *chunks[:number]])
        if (reached := cost(selection)) > highest:
            best, highest = selection, reached
    return best


def _shortest(chunks: Sequence[Chunk], least: int, holds: Callable[[Sequence[Chunk]], bool]) -> int:
    """How many chunks it takes until ``holds``, which is false for ``least`` of them and true for all."""
    low, high = least, len(chunks)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(chunks[:middle]) else (middle, high)
    return high


def smallest(graph: ChannelGraph, price: Price, cost: Callable[[Selection], float]) -> float:
    """The lowest cost that the floors allow when units of a group are worth the same; arguments as for `select`."""
    removals = [by_score(group, np.ones(group.num_units)) for group in graph.groups]
    chunks = list(_in_order(graph, removals, price, SelectOptions()))
    return cost(_selection(graph, [removal.order for removal in removals], _times(chunks)))


def _in_order(
    graph: ChannelGraph, removals: Sequence[Removal], price: Price, options: SelectOptions
) -> Iterator[Chunk]:
    """All chunks that the floors allow; the next is always the one that loses least for what it saves by then."""
    queues = [list(_chunks(graph, index, removals, options)) for index in range(len(graph.lumps))]
    for queue in queues:
        queue.reverse()
    uniform = options.scope == "uniform"
    room = _Room(graph, options)
    savings, progress = np.ones(len(queues)), np.inf
    losses = np.array([queue[-1][0] if queue else np.inf for queue in queues])
    while np.isfinite(losses).any():
        if not uniform and progress > REPRICE:
            savings, progress = _savings(graph, price, room.kept), 0.0
        # a head that runs in training only saves nothing: it goes last
        keys = np.where(np.isinf(losses), np.inf, losses / np.maximum(savings, np.finfo(float).tiny))
        index = int(keys.argmin()) if np.isfinite(keys).any() else int(losses.argmin())
        _, chunk = queues[index].pop()
        if room.take(chunk):
            progress += savings[index] * chunk.times
            yield chunk
        else:
            queues[index].clear()
        losses[index] = queues[index][-1][0] if queues[index] else np.inf


def _savings(graph: ChannelGraph, price: Price, kept: Array) -> npt.NDArray[np.float64]:
    """What each lump saves when it is the next to go."""
    now, saved = price(kept), []
    for lump in graph.lumps:
        less = kept.copy()
        less[list(lump.units)] -= list(lump.units.values())
        saved.append(now - price(less))
    return np.array(saved)


def _chunks(
    graph: ChannelGraph, index: int, removals: Sequence[Removal], options: SelectOptions
) -> Iterator[tuple[float, Chunk]]:
    """The chunks of one lump in order, each with its loss for every time that the lump goes; losses never fall.

    Where they would, the chunks up to there are worth more together than the first of them alone: they share one loss.
    """
    lump = graph.lumps[index]
    available = min(int(graph.sizes[g]) // n for g, n in lump.units.items())
    taken = 0
    pools: list[tuple[float, list[Chunk]]] = []  # (loss, chunks)
    for times in _steps(graph, index, available, options.round_to):
        if options.scope == "uniform":
            loss = times * (taken + times) / available
        else:
            cut = [(removals[g].losses, n) for g, n in lump.units.items()]
            loss = sum(float(losses[(taken + times) * n] - losses[taken * n]) for losses, n in cut)
        taken += times
        pool = (loss, [Chunk(index, times)])
        while pools and _slope(pools[-1]) > _slope(pool):
            before = pools.pop()
            pool = (before[0] + pool[0], before[1] + pool[1])
        pools.append(pool)
    return ((_slope(pool), chunk) for pool in pools for chunk in pool[1])


def _slope(pool: tuple[float, list[Chunk]]) -> float:
    return pool[0] / sum(chunk.times for chunk in pool[1])


def _steps(graph: ChannelGraph, lump: int, available: int, round_to: int) -> Iterator[int]:
    """How often the lump goes at once, so that the widths which it alone decides become multiples of ``round_to``."""
    units = graph.lumps[lump].units
    lengths = graph.lengths
    pure: list[tuple[int, int]] = []  # (length, what one lump takes)
    if round_to > 1:
        for row in range(lengths.matrix.shape[0]):
            part = slice(lengths.matrix.indptr[row], lengths.matrix.indptr[row + 1])
            groups, counts = lengths.matrix.indices[part], lengths.matrix.data[part]
            if len(groups) and set(groups.tolist()) <= set(units):
                length = int(lengths.fixed[row] + counts @ graph.sizes[groups])
                pure.append((length, int(sum(c * units[int(g)] for g, c in zip(groups, counts, strict=True)))))
    taken = 0
    while taken < available:
        times = 1
        while taken + times < available and any((n - (taken + times) * d) % round_to for n, d in pure):
            times += 1
        if any((n - (taken + times) * d) % round_to for n, d in pure):
            return
        yield times
        taken += times


class _Room:
    """How much of each group and axis is left, and whether the floors let a chunk go."""

    def __init__(self, graph: ChannelGraph, options: SelectOptions) -> None:
        matrix = graph.lengths.matrix.tocsc()
        self.kept = graph.sizes.copy()
        self._lumps = graph.lumps
        self._length = graph.lengths.fixed + graph.lengths.matrix @ graph.sizes
        floor = np.maximum(options.min_channels, np.ceil(FLOOR * self._length))
        self._least = np.minimum(self._length, floor).astype(np.int64)
        self._effects: list[tuple[Array, Array]] = []
        for lump in graph.lumps:
            removal = np.zeros(len(self.kept), dtype=np.int64)
            removal[list(lump.units)] = list(lump.units.values())
            effect = matrix @ removal
            rows = np.flatnonzero(effect)
            self._effects.append((rows, effect[rows]))

    def take(self, chunk: Chunk) -> bool:
        """Whether the chunk fits; if so it is gone. Once one does not, nor do later ones of its lump."""
        rows, effect = self._effects[chunk.lump]
        units = self._lumps[chunk.lump].units
        left = self._length[rows] - chunk.times * effect
        if (left < self._least[rows]).any() or any(self.kept[g] < n * chunk.times for g, n in units.items()):
            return False
        self._length[rows] = left
        for g, n in units.items():
            self.kept[g] -= n * chunk.times
        return True


def _times(taken: Sequence[Chunk]) -> dict[int, int]:
    times: dict[int, int] = {}
    for chunk in taken:
        times[chunk.lump] = times.get(chunk.lump, 0) + chunk.times
    return times


def _selection(graph: ChannelGraph, order: Sequence[Array], times: Mapping[int, int]) -> Selection:
    counts: dict[int, int] = {}
    for index, number in times.items():
        for g, n in graph.lumps[index].units.items():
            counts[g] = counts.get(g, 0) + n * number
    return Selection({g: np.sort(order[g][:count]) for g, count in counts.items()}, dict(times))
