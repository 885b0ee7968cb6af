"""Bottleneck insertion: layers of low rank in the place of wide ones, chosen by what the model's outputs lose.

>>> import torch, compress
>>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
>>> images = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)) @ torch.ones(4, 32)
>>> result = compress.factorize(model, images[:1], budget=compress.Budget(macs=0.5), calibration=[images])
>>> type(result.model[0]).__name__, result.after.macs <= result.before.macs / 2
('LowRankLinear', True)

targets (replaceable, lookups, attention) -> look -> options (decompositions, tables, heads) -> selection (or clock) ->
plan -> surgery;
:func:`compress.recover.recover` refits what comes out.
"""

from compress.factorize.factorizing import FactorResult, factorize
from compress.factorize.plan import Factor, FactorPlan
from compress.factorize.surgery import unfactorize
from compress.factorize.vbmf import vbmf_rank

__all__ = ["Factor", "FactorPlan", "FactorResult", "factorize", "unfactorize", "vbmf_rank"]
