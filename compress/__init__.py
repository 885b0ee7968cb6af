"""Make trained PyTorch models smaller: find removable channels, rank them, remove them for real, retrain, repeat.

>>> import torch, compress
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> result = compress.prune(model, torch.zeros(1, 8), budget=compress.Budget(macs=0.5))
>>> result.model[0].out_features, result.plan.exact
(8, True)

The pipeline, one file each: trace -> (rules) -> channels -> criteria -> select -> plan -> surgery -> verify -> recover
-> artifact; :func:`iterate` repeats it with training in between.
"""

from compress.artifact import load, save
from compress.budget import Budget
from compress.channels import ChannelGraph, ChannelGroup, FrozenAxis, Member, trace
from compress.checkpoint import load_state_dict, read_state_dict
from compress.cost import Cost, latency, measure
from compress.criteria import CRITERIA, Criterion, Evidence
from compress.errors import (
    ArtifactError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    PruneError,
    TraceError,
)
from compress.factorize import Factor, FactorPlan, FactorResult, factorize, unfactorize
from compress.loop import StopRule, iterate
from compress.nuclear_norm import NuclearNorm
from compress.plan import PlanGroup, PlanMember, PrunePlan
from compress.plans import Plan, plan_kind
from compress.pruning import PruneResult, prune
from compress.removal import Removal
from compress.sensitivity import SensitivityPoint, sensitivity
from compress.shrink import ShrinkPlan, ShrinkResult, shrink
from compress.sparsity import GroupLasso
from compress.surgery import apply, mask

__all__ = [
    "CRITERIA",
    "ArtifactError",
    "Budget",
    "BudgetError",
    "CalibrationError",
    "ChannelGraph",
    "ChannelGroup",
    "CheckpointError",
    "Cost",
    "Criterion",
    "Evidence",
    "Factor",
    "FactorPlan",
    "FactorResult",
    "FrozenAxis",
    "GroupLasso",
    "Member",
    "NuclearNorm",
    "Plan",
    "PlanGroup",
    "PlanMember",
    "PruneError",
    "PrunePlan",
    "PruneResult",
    "Removal",
    "SensitivityPoint",
    "ShrinkPlan",
    "ShrinkResult",
    "StopRule",
    "TraceError",
    "apply",
    "factorize",
    "iterate",
    "latency",
    "load",
    "load_state_dict",
    "mask",
    "measure",
    "plan_kind",
    "prune",
    "read_state_dict",
    "save",
    "sensitivity",
    "shrink",
    "trace",
    "unfactorize",
]
