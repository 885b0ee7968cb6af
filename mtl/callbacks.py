"""What users may do between the steps and epochs of a run."""

from __future__ import annotations

from torch import nn

from mtl.history import Epoch


class Callback:
    """Subclass it and override what is needed; ``mtl.fit`` calls it in training, in every process."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """The optimizer has taken its ``step``-th step, 1 for the first."""

    def after_epoch(self, model: nn.Module, row: Epoch) -> bool | None:
        """An epoch is done and measured, but not yet saved; True ends the run after it."""
