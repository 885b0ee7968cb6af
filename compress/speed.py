"""Meet a latency budget as it is measured: the table of timings proposes, the clock decides."""

import math
from collections.abc import Callable
from typing import TypeVar

from compress.errors import BudgetError

Chosen = TypeVar("Chosen")

ATTEMPTS = 10  # selections that are measured
CLOSE = 0.04  # of the target: what is measured may lie so far below it


def meet_latency(choose: Callable[[float], Chosen], measured: Callable[[Chosen], float], target: float) -> Chosen:
    """The selection whose measured latency comes closest to ``target`` from below, of the dense model's as a part.

    Args:
        choose: the selection whose predicted latency is at most a fraction; :class:`BudgetError` with the smallest
            fraction that can be predicted if it cannot be reached.
        measured: the latency of a selection, interleaved with the dense model's.

    Raises:
        BudgetError: the smallest selection is measured above ``target``; says how much remains.
    """
    aim, low, high = target, None, (1.0, 1.0)  # (predicted, measured) on both sides of the target
    best: tuple[float, Chosen] | None = None
    for _ in range(ATTEMPTS):
        smallest = False
        try:
            selection = choose(aim)
        except BudgetError as error:
            if error.smallest is None:
                raise
            smallest, aim = True, error.smallest
            selection = choose(aim)
        found = measured(selection)
        if found <= target and (best is None or found > best[0]):
            best = found, selection
        if (1 - CLOSE) * target <= found <= target:
            break
        if found > target and smallest:
            if best is not None:
                break
            raise BudgetError(
                f"the budget latency={target:.3g} cannot be reached: at least {found:.3g} of the dense model's seconds "
                "remain on this machine; raise the budget, protect less, or allow more (inexact groups, methods)",
                smallest=found,
            )
        low, high = ((aim, found), high) if found <= target else (low, (aim, found))
        aim = _between(low, high, (1 - CLOSE / 2) * target)
    if best is None:
        raise BudgetError(
            f"the budget latency={target:.3g} was not met in {ATTEMPTS} attempts: measurements on this machine vary "
            "too much; try again when it is idle"
        )
    return best[1]


def _between(low: tuple[float, float] | None, high: tuple[float, float], wanted: float) -> float:
    """What to predict for ``wanted`` to be measured: in proportion, or on the power law through both points."""
    if low is None:
        return high[0] * wanted / high[1]
    predicted, measured = (math.log(b / a) for a, b in zip(low, high, strict=True))
    part = math.log(wanted / low[1]) / measured if measured > 0 else 0.5
    return low[0] * math.exp(predicted * min(max(part, 0.1), 0.9))
