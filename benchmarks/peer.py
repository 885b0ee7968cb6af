"""Torch-Pruning to an exact budget: what benchmarks compare with."""

import copy
from typing import Any

import torch
from torch import nn

import compress
from compress.errors import PruneError

SEARCH_STEPS = 8  # halvings of the ratio: it is met to 0.4 % of the channels
MAX_RATIO = 0.95


def prune_to_macs(model: nn.Module, example: torch.Tensor, importance: Any, macs: float) -> nn.Module:
    """The largest model of at most ``macs`` MACs that global pruning by ``importance`` gives; ``model`` stays as it is.

    The peer's ratio is of channels, so it is searched for. Gradients of ``model`` are there for importances that look
    at them. The last linear layer keeps its outputs, as its manual says.

    Raises:
        PruneError: no ratio leads there.
    """
    import torch_pruning

    low, high, best = 0.0, MAX_RATIO, None
    for _ in range(SEARCH_STEPS):
        ratio = (low + high) / 2
        pruned = copy.deepcopy(model)
        for parameter, original in zip(pruned.parameters(), model.parameters(), strict=True):
            parameter.grad = None if original.grad is None else original.grad.clone()
        last = [m for m in pruned.modules() if isinstance(m, nn.Linear)][-1:]
        torch_pruning.pruner.BasePruner(
            pruned, example, importance=importance, global_pruning=True, pruning_ratio=ratio, max_pruning_ratio=0.9,
            ignored_layers=last,
        ).step()  # fmt: skip
        pruned.zero_grad()
        if compress.measure(pruned, example).macs <= macs:
            high, best = ratio, pruned
        else:
            low = ratio
    if best is None:
        raise PruneError(f"no ratio of channels up to {MAX_RATIO} reaches {macs:,.0f} MACs")
    return best
