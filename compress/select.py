"""Choose what goes: the least important channels, in lumps that keep the model consistent, until the budget is met."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from compress.channels import ChannelGraph, ChannelGroup
from compress.errors import BudgetError, PruneError
from compress.labels import Array

Scores = Sequence[npt.NDArray[np.float64]]

FLOOR = 0.1  # no axis falls below this part of its length: PruningBench's "10 % group-wise protection"
SCOPES = ("global", "uniform")
MAX_SKIPS = 11  # large steps that may be left out to come closer to the budget
CLOSE_ENOUGH = 0.001  # of the budget


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
    group. ``round_to``: widths become multiples of it, or of what ``multiples`` has for their lump. ``min_channels``:
    no axis gets shorter. ``exact_steps``: the cost is exact, so that the last step may be chosen by it."""

    scope: str = "global"
    round_to: int = 1
    min_channels: int = 1
    exact_steps: bool = True
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
    scores: Scores,
    savings: Sequence[float],
    cost: Callable[[Selection], float],
    target: float,
    options: SelectOptions,
) -> Selection:
    """The shortest prefix of the removal order whose cost is at most ``target``.

    Args:
        scores: importance of the units of each group, shape (units,), higher is kept.
        savings: what removing each lump once from the dense model saves, in any unit.
        cost: the exact cost of a selection, as a fraction of the dense model's; falls as more is removed.
        target: fraction in (0, 1].

    Raises:
        BudgetError: the target is below what the floors allow; says the smallest that can be reached.
    """
    order = [np.argsort(values, kind="stable") for values in scores]
    chunks = list(_feasible(graph, _ordered_chunks(graph, scores, order, savings, options), options))

    def after(taken: Sequence[Chunk]) -> Selection:
        return _selection(graph, order, _times(taken))

    if target >= 1:
        return after([])
    smallest = cost(after(chunks))
    if smallest > target:
        raise BudgetError(
            f"the budget {target:.3g} cannot be reached: at least {smallest:.3g} remains with min_channels="
            f"{options.min_channels}, round_to={options.round_to} and a floor of {FLOOR:.0%} an axis; "
            "raise the budget, protect less, or allow inexact groups",
            smallest,
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


def smallest(graph: ChannelGraph, savings: Sequence[float], cost: Callable[[Selection], float]) -> float:
    """The lowest cost that the floors allow when units of a group are worth the same; arguments as for `select`."""
    scores = [np.ones(int(size)) for size in graph.sizes]
    order = [np.arange(int(size), dtype=np.int64) for size in graph.sizes]
    options = SelectOptions()
    chunks = list(_feasible(graph, _ordered_chunks(graph, scores, order, savings, options), options))
    return cost(_selection(graph, order, _times(chunks)))


def _ordered_chunks(
    graph: ChannelGraph, scores: Scores, order: Sequence[Array], savings: Sequence[float], options: SelectOptions
) -> list[Chunk]:
    losses = [_losses(g, values[ranks]) for g, values, ranks in zip(graph.groups, scores, order, strict=True)]
    keyed: list[tuple[float, Chunk]] = []
    for index, lump in enumerate(graph.lumps):
        available = min(int(graph.sizes[g]) // n for g, n in lump.units.items())
        taken = 0
        for times in _steps(graph, index, available, options.multiples.get(index, options.round_to)):
            if options.scope == "uniform":
                key = (taken + times) / available
            else:
                key = sum(float(losses[g][(taken + times) * n] - losses[g][taken * n]) for g, n in lump.units.items())
                saved = times * savings[index]
                key = key / saved if saved > 0 else np.inf  # a head that runs in training only saves nothing: last
            taken += times
            keyed.append((key, Chunk(index, times)))
    # within a lump keys rise, as units are sorted; a stable sort keeps equal ones in order
    return [chunk for _, chunk in sorted(keyed, key=lambda item: item[0])]


def _losses(group: ChannelGroup, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What is lost when the first k of the sorted ``values`` go, shape (units + 1,): ``-log`` of the part that stays.

    The logarithm makes each further channel of a layer dearer, so that no layer empties while another is untouched.
    It counts once for each layer that writes the channel: one of a residual stream takes its part from every block.
    """
    shifted = values - min(float(values.min()), 0.0)
    total = float(shifted.sum())
    num_layers = sum(member.role == "producer" for member in group.members)
    if total <= 0:  # all alike
        shifted, total = np.ones_like(shifted), float(len(shifted))
    stays = 1.0 - np.concatenate([[0.0], np.cumsum(shifted)]) / total
    return -np.log(np.maximum(stays, np.finfo(float).tiny)) * max(num_layers, 1)


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


def _feasible(graph: ChannelGraph, chunks: Sequence[Chunk], options: SelectOptions) -> Iterator[Chunk]:
    """The chunks that leave every axis long enough; once a chunk does not fit, nor do later ones of its lump."""
    matrix = graph.lengths.matrix.tocsc()
    length = graph.lengths.fixed + graph.lengths.matrix @ graph.sizes
    least = np.minimum(length, np.maximum(options.min_channels, np.ceil(FLOOR * length))).astype(np.int64)
    kept = graph.sizes.copy()
    effects: list[tuple[Array, Array]] = []
    for lump in graph.lumps:
        removal = np.zeros(len(kept), dtype=np.int64)
        removal[list(lump.units)] = list(lump.units.values())
        effect = matrix @ removal
        rows = np.flatnonzero(effect)
        effects.append((rows, effect[rows]))
    finished: set[int] = set()
    for chunk in chunks:
        if chunk.lump in finished:
            continue
        rows, effect = effects[chunk.lump]
        left = length[rows] - chunk.times * effect
        enough = all(kept[g] >= n * chunk.times for g, n in graph.lumps[chunk.lump].units.items())
        if not enough or (left < least[rows]).any():
            finished.add(chunk.lump)
            continue
        length[rows] = left
        for g, n in graph.lumps[chunk.lump].units.items():
            kept[g] -= n * chunk.times
        yield chunk


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
