"""How tasks share a model: a trunk with a head per task (hard sharing), as a whole or in part."""

from mtl.sharing.hard import HardShared
from mtl.sharing.union import UnionSoftmax

__all__ = ["HardShared", "UnionSoftmax"]
