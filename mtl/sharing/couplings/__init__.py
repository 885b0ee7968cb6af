"""How the models of ``SoftShared`` are drawn to each other: ``L2Coupling``, ``TraceNorm``, sums, or one of yours."""

from mtl.sharing.couplings.base import Coupling, Scaled, Stacked, Sum
from mtl.sharing.couplings.l2 import L2Coupling
from mtl.sharing.couplings.trace_norm import TraceNorm

__all__ = ["Coupling", "L2Coupling", "Scaled", "Stacked", "Sum", "TraceNorm"]
