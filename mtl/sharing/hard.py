"""Hard parameter sharing: one trunk, a head per task (Caruana 1997, "Multitask Learning", section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class HardShared(nn.Module):
    """A trunk that every task shares, and a head for each task.

    Args:
        trunk: any module; its output is the input of every head
        heads: a module per task name

    Raises:
        ValueError: if there is no head.

    Example:
        >>> import torch
        >>> model = HardShared(nn.Linear(64, 32), heads={"digit": nn.Linear(32, 10), "even": nn.Linear(32, 2)})
        >>> {name: tuple(out.shape) for name, out in model(torch.randn(5, 64)).items()}
        {'digit': (5, 10), 'even': (5, 2)}
    """

    def __init__(self, trunk: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not heads:
            raise ValueError("heads is empty: give one module per task, for example heads={'digit': nn.Linear(64, 10)}")
        self.trunk = trunk
        self.heads = nn.ModuleDict(heads)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The trunk's arguments in, ``{task: output of its head}`` out."""
        features = self.trunk(*args, **kwargs)
        return {name: head(features) for name, head in self.heads.items()}
