"""What a model runs on while it is traced: tensors without data, of three kinds from the fastest to the surest."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.shapes import QuickShapes


class StandIns(Protocol):
    """Tensors for a model to run on."""

    def of(self, tensor: Tensor) -> Tensor:
        """A stand-in for ``tensor``."""

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` gives; ``func`` is an operator."""

    def context(self) -> AbstractContextManager[Any]:
        """The block in which the model runs."""


class MetaTensors:
    """Shapes alone. Fails where a model makes tensors for a device by name, or looks at values."""

    def __init__(self) -> None:
        self._shapes = QuickShapes()

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.to("meta")

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self._shapes(func, args, kwargs)

    def context(self) -> AbstractContextManager[Any]:
        return torch.device("meta")


class FakeTensors:
    """Shapes and a device; small constants keep their values. Several times slower, fails where data decide."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def of(self, tensor: Tensor) -> Tensor:
        return self.mode.from_tensor(tensor, static_shapes=True)

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return func(*args, **kwargs)

    @contextmanager
    def context(self) -> Iterator[None]:
        logger = logging.getLogger(FakeTensorMode.__module__)
        before, logger.disabled = logger.disabled, True  # it logs what it raises; what it cannot do is done for real
        try:
            with self.mode:
                yield
        finally:
            logger.disabled = before


class RealTensors:
    """The tensors themselves: a forward pass with all its arithmetic, for control flow that depends on data."""

    def of(self, tensor: Tensor) -> Tensor:
        return tensor

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return func(*args, **kwargs)

    def context(self) -> AbstractContextManager[Any]:
        return nullcontext()


STAND_INS: tuple[Callable[[], StandIns], ...] = (
    MetaTensors,
    FakeTensors,
    RealTensors,
)
ON_DEVICE = STAND_INS[1:]  # the operators that the tensors' own device would run: they differ for recurrent layers
REAL = STAND_INS[2:]  # those that these very values lead to
