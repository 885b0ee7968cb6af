"""Thin layers that lose nothing of what a constant can make up for: the mean of the inputs."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from compress.factorize.decompositions import Problem
from compress.factorize.options import Layer
from compress.factorize.plan import FactorPlan
from compress.factorize.replaceable import owner_of
from compress.gram import GramSums
from compress.recover.weights import tensors_of
from compress.sites import Key


def centred(sums: Mapping[Key, GramSums]) -> dict[Key, GramSums]:
    """Those of layers with a constant are about the mean of the inputs: see :func:`keep_means`."""
    return {key: known.centred() for key, known in sums.items()}


@torch.no_grad()
def keep_means(model: nn.Module, layers: Sequence[Layer], plan: FactorPlan, sums: Mapping[Key, GramSums]) -> None:
    """Change the constants behind the thin layers of ``plan``, so that outputs have the mean that they had.

    Args:
        layers: with the weights that those layers stand for.
        sums: about nothing.
    """
    tensors, problems = tensors_of(model), {layer.name: layer.problem for layer in layers}
    known = {owner_of(one.site): one for one in sums.values()}
    for factor in plan.factors:
        problem, one = problems[factor.module], known.get(factor.module)
        if one is None or one.landing.intercept is None or not isinstance(problem, Problem):
            continue
        name, sign = one.landing.intercept
        shift = tensors.get(name, tensors.get(f"{factor.module}.{factor.last}.bias"))
        if shift is None:
            continue
        merged = model.get_submodule(factor.module).merge().weight  # type: ignore[operator]
        lost = (problem.outer(problem.weight) - merged.to(problem.weight)).flatten(1)
        mean = one.gram[:, -1, :-1] / max(one.num_rows, 1)
        change = lost.reshape(len(mean), -1, mean.shape[1]) @ mean[:, :, None]
        shift += sign * change.reshape(shift.shape).to(shift)
