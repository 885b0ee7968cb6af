"""Pruning and factorisation under one budget."""

from compress.shrink.plan import ShrinkPlan

__all__ = ["ShrinkPlan"]
