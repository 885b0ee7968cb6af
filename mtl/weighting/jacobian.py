"""Gradients of several tasks made one by torchjd (Quinton & Rey 2024, "Jacobian Descent for Multi-Objective
Optimization"): PCGrad, MGDA, CAGrad, IMTL, Nash-MTL, UPGrad and Aligned-MTL."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtl.weighting.base import GradientWeighting

# Each takes a number of tasks and gives the function from the Gramian of their gradients to their factors.
_METHODS: dict[str, Callable[[Any, int], Callable[[Tensor], Tensor]]] = {
    "pcgrad": lambda jd, num_tasks: jd.PCGradWeighting(),  # Yu et al. 2020
    "mgda": lambda jd, num_tasks: jd.MGDAWeighting(),  # Désidéri 2012; Sener & Koltun 2018
    "cagrad": lambda jd, num_tasks: jd.CAGradWeighting(c=0.5),  # Liu et al. 2021, whose experiments use 0.4 to 0.5
    "imtl": lambda jd, num_tasks: jd.IMTLGWeighting(),  # Liu et al. 2021, the part for gradients
    "nash": lambda jd, num_tasks: _of_root(jd.NashMTL(n_tasks=num_tasks)),  # Navon et al. 2022
    "upgrad": lambda jd, num_tasks: jd.UPGradWeighting(),  # Quinton & Rey 2024
    "aligned": lambda jd, num_tasks: jd.AlignedMTLWeighting(),  # Senushkin et al. 2023
}
METHODS = tuple(_METHODS)


class Jacobian(GradientWeighting):
    """Factors of the shared gradients by one of torchjd's methods.

    The scale is that of torchjd: PCGrad adds the projected gradients, UPGrad, MGDA, IMTL and Aligned-MTL average them.

    Args:
        method: "pcgrad", "mgda", "cagrad", "imtl", "nash", "upgrad" or "aligned"

    Raises:
        ValueError: for an unknown method, and where torchjd, or a solver that the method needs, is not installed.
    """

    def __init__(self, method: str) -> None:
        super().__init__()
        if method not in _METHODS:
            raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
        self._method = method
        self._functions: dict[int, Callable[[Tensor], Tensor]] = {}
        self._function(2)  # what is not installed is said at once

    def combine(self, gramian: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
        """See ``GradientWeighting``."""
        return self._function(len(gramian))(gramian).to(gramian)

    def extra_repr(self) -> str:
        """The method."""
        return self._method

    def _function(self, num_tasks: int) -> Callable[[Tensor], Tensor]:
        if num_tasks not in self._functions:
            try:
                import torchjd.aggregation

                self._functions[num_tasks] = _METHODS[self._method](torchjd.aggregation, num_tasks)
            except ImportError as error:
                raise ValueError(
                    f"weighting {self._method!r} needs what is not installed ({str(error).splitlines()[0]}); "
                    "run: pip install 'prunus[gradients]'"
                ) from error
        return self._functions[num_tasks]


def _of_root(aggregator: Any) -> Callable[[Tensor], Tensor]:
    """Factors by a method that takes the Jacobian: any matrix with its Gramian will do, such as its square root."""

    def weigh(gramian: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(gramian.double())
        aggregator.reset()  # the factors of a step must not depend on what an earlier process has seen
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # cvxpy on the form of torchjd's problem, at every call
            return aggregator.weighting((vectors * values.clamp(min=0).sqrt()) @ vectors.T)

    return weigh
