"""Exponential moving average of a model's weights and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ModelAverage:
    """``average <- decay * average + (1 - decay) * model`` after every step.

    Buffers are averaged with the weights, since batch-norm statistics belong to the weights that produced them;
    buffers of integers (counters) are copied. Early on the decay is ``(1 + step) / (10 + step)`` where that is
    smaller, so that the random start is forgotten (as in TensorFlow's ``ExponentialMovingAverage`` with
    ``num_updates``).

    Args:
        model: what to average; it is read, never changed, outside ``write_to`` and ``applied_to``
        decay: a step, in (0, 1)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.average = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step of the model into the average."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        floating: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, tensor in _tensors(model).items():
            if tensor.is_floating_point():
                floating[0].append(self.average[name])
                floating[1].append(tensor.detach())
            else:
                self.average[name].copy_(tensor)
        torch._foreach_lerp_(floating[0], floating[1], 1 - decay)

    @torch.no_grad()
    def write_to(self, model: nn.Module) -> None:
        """Give the model the averaged values."""
        for name, tensor in _tensors(model).items():
            tensor.copy_(self.average[name])

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """The model holds the average inside the block, and exactly its own values again after it."""
        own = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
        self.write_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in _tensors(model).items():
                    tensor.copy_(own[name])

    def state_dict(self) -> dict[str, object]:
        """What ``load_state_dict`` needs."""
        return {"num_updates": self.num_updates, "average": self.average}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from a saved state of a model with the same names and shapes."""
        num_updates, average = state["num_updates"], state["average"]
        assert isinstance(num_updates, int)
        assert isinstance(average, dict)
        self.num_updates = num_updates
        for name, tensor in self.average.items():
            tensor.copy_(average[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
