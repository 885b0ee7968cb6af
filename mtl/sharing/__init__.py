"""How tasks share a model: a trunk with a head per task, shared wholly or in part (hard), or a model per task, coupled
(soft)."""

from mtl.sharing.collapse import Collapsed
from mtl.sharing.couplings import Coupling, L2Coupling, TraceNorm
from mtl.sharing.hard import HardShared
from mtl.sharing.soft import SoftShared
from mtl.sharing.union import UnionSoftmax

__all__ = ["Collapsed", "Coupling", "HardShared", "L2Coupling", "SoftShared", "TraceNorm", "UnionSoftmax"]
