"""Which batches an epoch is made of, when every task has data of its own.

Each step takes one batch of every task that takes part in it, so that weightings see losses side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from mtl.batch import Batch, read
from mtl.seeding import seed_data
from mtl.task import Task

Sampling = Literal["proportional", "sqrt", "uniform"]
_EXPONENTS: dict[Sampling, float] = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0}
# Far more epochs than a run has: a further pass over a task's data has an order of its own.
_PASS = 1_000_000


class Steps(Protocol):
    """The steps of an epoch."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def seed(self, seed: int, epoch: int) -> None:
        """Choose the order of the next iteration."""


def steps_of(data: Any, tasks: Sequence[Task], sampling: Sampling) -> Steps:
    """The steps over one data set with the labels of all tasks, or over ``{task: data}``.

    Raises:
        ValueError: for data without length or batches, and a task without data.
    """
    if not isinstance(data, Mapping):
        return _Shared(data, tasks)
    _check_names(data, tasks)
    return _Mixed({task: data[task.name] for task in tasks}, sampling)


def batches_of(data: Any, tasks: Sequence[Task]) -> Iterator[Batch]:
    """All batches once, one task after the other where each has its own data."""
    if not isinstance(data, Mapping):
        yield from (read(batch, tasks) for batch in data)
        return
    _check_names(data, tasks)
    for task in tasks:
        yield from (_owned({task.name: read(batch, [task])}) for batch in data[task.name])


def num_batches(lengths: Sequence[int], sampling: Sampling) -> list[int]:
    """How many batches of each task make an epoch: as many as there are in all, shared out by ``length ** exponent``.

    The exponent is 1 for "proportional" (every sample once), 1/2 for "sqrt" and 0 for "uniform"; each task has at least
    one batch.

    Example:
        >>> [num_batches([90, 10], sampling) for sampling in ("proportional", "sqrt", "uniform")]
        [[90, 10], [75, 25], [50, 50]]
    """
    shares = [length ** _EXPONENTS[sampling] for length in lengths]
    return [max(1, round(sum(lengths) * share / sum(shares))) for share in shares]


class _Shared:
    """One data set with the labels of all tasks: an epoch is every batch once."""

    def __init__(self, data: Iterable[Any], tasks: Sequence[Task]) -> None:
        self._data, self._tasks = data, tasks
        self._length = _length(data, "the data")

    def __len__(self) -> int:
        return self._length

    def seed(self, seed: int, epoch: int) -> None:
        seed_data(self._data, seed, epoch)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._data:
            yield read(batch, self._tasks)


class _Mixed:
    """A data set per task. The task with most batches has one in every step; the others' are spread out evenly."""

    def __init__(self, data: Mapping[Task, Iterable[Any]], sampling: Sampling) -> None:
        self._data = data
        lengths = [_length(own, f"task {task.name!r}: the data") for task, own in data.items()]
        self._counts = dict(zip(data, num_batches(lengths, sampling), strict=True))
        self._seed, self._epoch = 0, 0

    def __len__(self) -> int:
        return max(self._counts.values())

    def seed(self, seed: int, epoch: int) -> None:
        self._seed, self._epoch = seed, epoch
        for own in self._data.values():
            seed_data(own, seed, epoch)

    def __iter__(self) -> Iterator[Batch]:
        num_steps = len(self)
        streams = {task: self._stream(own) for task, own in self._data.items()}
        for step in range(num_steps):
            # Task t takes part when its count passes a whole number; all do in the last step.
            present = (t for t, n in self._counts.items() if (step + 1) * n // num_steps > step * n // num_steps)
            yield _owned({task.name: read(next(streams[task]), [task]) for task in present})

    def _stream(self, own: Iterable[Any]) -> Iterator[Any]:
        passes = 0
        while True:
            yield from own
            passes += 1
            seed_data(own, self._seed, self._epoch + passes * _PASS)


def _owned(parts: Mapping[str, Batch]) -> Batch:
    labels = {name: found for part in parts.values() for name, found in part.labels.items()}
    return Batch({name: part.inputs for name, part in parts.items()}, labels, own=True)


def _check_names(data: Mapping[str, Any], tasks: Sequence[Task]) -> None:
    names = {task.name for task in tasks}
    if missing := sorted(names - set(data)):
        raise ValueError(
            f"task {missing[0]!r} has no data: there are data for {sorted(data)}; give one loader per task"
        )
    if unknown := sorted(set(data) - names):
        raise ValueError(f"there are data for {unknown[0]!r}, which is no task: the tasks are {sorted(names)}")


def _length(data: Iterable[Any], what: str) -> int:
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(
            f"{what} ({type(data).__name__}) have no length, and every epoch iterates them: give a DataLoader over a "
            "sized data set, an mtl.data.TensorLoader or a list of batches"
        ) from None
    if length == 0:
        raise ValueError(f"{what} hold no batch: there is nothing to train on")
    return length
