"""Pruning and factorisation under one budget.

>>> import torch, compress
>>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
>>> images = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)) @ torch.ones(4, 32)
>>> result = compress.shrink(model, images[:1], budget=compress.Budget(macs=0.3), calibration=[images])
>>> result.after.macs <= 0.3 * result.before.macs
True

prune -> narrow -> factorise, for several divisions of the budget -> the one that loses least -> plan -> recover.
"""

from compress.shrink.plan import ShrinkPlan
from compress.shrink.shrinking import ShrinkResult, shrink

__all__ = ["ShrinkPlan", "ShrinkResult", "shrink"]
