"""How tasks share a model: today one trunk with a head per task (hard sharing)."""

from mtl.sharing.hard import HardShared

__all__ = ["HardShared"]
