"""Which fraction of the dense model each round of pruning keeps, on the way to the budget."""

from collections.abc import Callable

from compress.errors import PruneError

Schedule = Callable[[float, float], float]
"""``schedule(final, progress)``: the fraction kept after ``progress`` in (0, 1] of the rounds; ``final`` at 1."""


def one_shot(final: float, progress: float) -> float:
    """Everything in the first round; the rounds after it only train."""
    return final


def linear(final: float, progress: float) -> float:
    """The same amount in every round."""
    return 1 - (1 - final) * progress


def cubic(final: float, progress: float) -> float:
    """Much at first, where redundancy is large, then less and less.

    Zhu & Gupta (2017), "To prune, or not to prune: exploring the efficacy of pruning for model compression", eq. 1.
    """
    return final + (1 - final) * (1 - progress) ** 3


def exponential(final: float, progress: float) -> float:
    """The same share of what is left in every round."""
    return final**progress


def prepared(schedule: str | Schedule, rounds: int) -> Schedule:
    """One round that removes nothing, then ``schedule`` over ``rounds``: a schedule for ``rounds + 1``.

    >>> [kept_fraction(prepared("linear", 2), 0.5, index, 3) for index in range(4)]
    [1.0, 1.0, 0.75, 0.5]
    """
    return lambda final, progress: kept_fraction(schedule, final, max(round(progress * (rounds + 1)) - 1, 0), rounds)


SCHEDULES: dict[str, Schedule] = {
    "one_shot": one_shot,
    "linear": linear,
    "cubic": cubic,
    "exponential": exponential,
}


def kept_fraction(schedule: str | Schedule, final: float, round_index: int, rounds: int) -> float:
    """Returns the fraction of the dense cost that is kept after ``round_index`` of ``rounds``.

    It is 1 at round 0 and ``final`` at the last. ``schedule`` is a name in :data:`SCHEDULES` or a function
    ``(final, progress) -> fraction``. Raises :class:`PruneError` for an unknown name, no rounds, or a function whose
    value is not in (0, 1].

    >>> [kept_fraction("linear", 0.5, index, 2) for index in range(3)]
    [1.0, 0.75, 0.5]
    """
    if rounds < 1:
        raise PruneError(f"rounds is {rounds}; at least one round is needed to prune")
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise PruneError(f"there is no schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
        schedule = SCHEDULES[schedule]
    if round_index == 0:
        return 1.0
    if round_index == rounds:
        return final  # exactly, whatever rounding the formula has at progress 1
    fraction = schedule(final, round_index / rounds)
    if not 0 < fraction <= 1:
        raise PruneError(
            f"the schedule keeps {fraction} of the model after round {round_index} of {rounds}; it must be in (0, 1]"
        )
    return fraction
