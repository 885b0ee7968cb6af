"""What a run measured, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, overload


@dataclass(frozen=True)
class Epoch:
    """One epoch of training.

    Args:
        epoch: 1 for the first
        lr: learning rate of its last step
        loss: mean training loss per task over the epoch's samples, as it was minimised (with label smoothing)
        train: metric per task on the training batches as they were seen (augmented, weights changing)
        validation: metric per task on the validation data after the epoch; empty without such data
        weights: factor of each task's loss at its end, or the mean of those that were used; empty when all are 1
        seconds: wall time, not compared by ``==``
        score: what ``keep="best"`` and ``patience`` go by, more is better; None without validation data
        skipped: batches that were left out by task, since the loss was not finite
        delta_m: relative gain over the reference in percent, of the validation metrics; None without
        cosines: between gradients of what two tasks share, on the epoch's first batch of at least two tasks,
            ``{"a~b": in [-1, 1]}``; measured where the run has a folder, and not compared by ``==``
    """

    epoch: int
    lr: float
    loss: dict[str, float]
    train: dict[str, float]
    validation: dict[str, float]
    weights: dict[str, float]
    seconds: float = field(compare=False)
    score: float | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    delta_m: float | None = None
    cosines: dict[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class History(Sequence[Epoch]):
    """The epochs of a run, in order: ``history[-1].validation["digit"]`` is the last validation metric of a task."""

    epochs: tuple[Epoch, ...] = ()

    def __len__(self) -> int:
        return len(self.epochs)

    @overload
    def __getitem__(self, index: int) -> Epoch: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Epoch, ...]: ...
    def __getitem__(self, index: int | slice) -> Epoch | tuple[Epoch, ...]:
        return self.epochs[index]

    @property
    def best(self) -> Epoch | None:
        """The epoch with the best validation score, the first of equals; None without scores."""
        scored = [epoch for epoch in self.epochs if epoch.score is not None]
        return max(scored, key=lambda epoch: epoch.score or 0.0) if scored else None

    def to_json(self) -> list[dict[str, Any]]:
        """Plain lists, dicts and numbers."""
        return [asdict(epoch) for epoch in self.epochs]

    @classmethod
    def from_json(cls, rows: list[dict[str, Any]]) -> History:
        """The inverse of ``to_json``."""
        return cls(tuple(Epoch(**row) for row in rows))
