"""Curves of a run in TensorBoard."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import nn

from layers.nuclear import effective_rank
from mtl.history import Epoch
from mtl.sharing.soft import SoftShared


class Board:
    """Writes one point per epoch; with no folder it does nothing.

    Args:
        folder: where the events go, None for nowhere
        first_epoch: points of a killed run at this epoch and after it are purged, so that none shows twice
    """

    def __init__(self, folder: str | os.PathLike[str] | None, first_epoch: int) -> None:
        self._writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every fit has a folder

            _wait_for_another_second(Path(folder))
            self._writer = SummaryWriter(os.fspath(folder), purge_step=first_epoch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, row: Epoch) -> None:
        """``lr``, ``score``, ``delta_m``, and ``loss/``, ``train/``, ``validation/``, ``weight/``, ``skipped/`` + task,
        ``cosine/`` + pair of tasks, at step = epoch; on disk at return."""
        if self._writer is None:
            return
        for name, number in {"lr": row.lr, "score": row.score, "delta_m": row.delta_m}.items():
            if number is not None:
                self._writer.add_scalar(name, number, row.epoch)
        groups: dict[str, Mapping[str, float]] = {
            "loss": row.loss,
            "train": row.train,
            "validation": row.validation,
            "weight": row.weights,
            "skipped": row.skipped,
            "cosine": row.cosines,
        }
        for group, values in groups.items():
            for task, value in values.items():
                self._writer.add_scalar(f"{group}/{task}", value, row.epoch)
        self._writer.flush()

    def spectra(self, model: nn.Module, epoch: int) -> None:
        """``effective_rank/`` and ``singular_values/`` of each stack of a ``SoftShared``; epoch 0 is the start."""
        if self._writer is None or not isinstance(model, SoftShared):
            return
        for name, values in model.spectra().items():
            self._writer.add_scalar(f"effective_rank/{name}", effective_rank(values), epoch)
            for index, value in enumerate(values.tolist()):
                self._writer.add_scalar(f"singular_values/{name}/{index}", value, epoch)
        self._writer.flush()


def _wait_for_another_second(folder: Path) -> None:
    # TensorBoard reads the files of a folder by name: the second of their making, then numbers of one digit or more.
    # Those of one second may be read in the wrong order, and then points are purged that should stay.
    while any(f".{int(time.time()):010d}." in file.name for file in folder.glob("events.out.tfevents.*")):
        time.sleep(0.05)
