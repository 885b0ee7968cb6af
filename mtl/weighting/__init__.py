"""How several losses become one: by name (``"equal"``, ``"uncertainty"``), by factors, or any ``Weighting``.

>>> resolve({"digit": 1.0, "even": 0.5}, ("digit", "even"))
Fixed(digit=1.0, even=0.5)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from mtl.weighting.base import GradientWeighting, Weighting
from mtl.weighting.dwa import DynamicWeightAverage
from mtl.weighting.equal import Equal
from mtl.weighting.fixed import Fixed
from mtl.weighting.geometric import GeometricMean
from mtl.weighting.gradnorm import GradNorm
from mtl.weighting.jacobian import METHODS, Jacobian
from mtl.weighting.random import RandomWeighting
from mtl.weighting.uncertainty import Uncertainty

__all__ = [
    "DynamicWeightAverage",
    "Equal",
    "Fixed",
    "GeometricMean",
    "GradNorm",
    "GradientWeighting",
    "Jacobian",
    "RandomWeighting",
    "Uncertainty",
    "Weighting",
    "resolve",
]


def _of_method(method: str, tasks: Sequence[str]) -> Weighting:
    return Jacobian(method)


_BY_NAME: dict[str, Callable[[Sequence[str]], Weighting]] = {
    "equal": lambda tasks: Equal(),
    "uncertainty": Uncertainty,
    "dwa": DynamicWeightAverage,
    "gradnorm": GradNorm,
    "random": lambda tasks: RandomWeighting(),
    "geometric": lambda tasks: GeometricMean(),
    **{method: partial(_of_method, method) for method in METHODS},
}


def resolve(weighting: str | Mapping[str, float] | Weighting, tasks: Sequence[str]) -> Weighting:
    """The weighting that is meant: a name, factors per task, or an object that is one already.

    Raises:
        ValueError: for an unknown name, or factors that do not name exactly the tasks.
    """
    if isinstance(weighting, Weighting):
        return weighting
    if isinstance(weighting, str):
        if weighting not in _BY_NAME:
            raise ValueError(f"unknown weighting {weighting!r}: use one of {sorted(_BY_NAME)}, or factors per task")
        return _BY_NAME[weighting](tasks)
    if set(weighting) != set(tasks):
        raise ValueError(
            f"weighting names the tasks {sorted(weighting)}, but they are {sorted(tasks)}: give one factor each"
        )
    return Fixed(weighting)
