"""What an error of a layer's outputs counts at the next layer that adds to something others read."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from compress.gram import GramSums
from compress.recorder import Trace
from compress.recover.chain import find_chains
from compress.sites import Key

FLOOR = 1e-12  # of the largest variance: what never varies is not divided by


def passed_on(sums: Mapping[Key, GramSums], trace: Trace, tensors: Mapping[str, Tensor]) -> dict[Key, GramSums]:
    """``sums`` where the outputs of a layer that feeds one other layer alone count what that makes of them.

    An error of such an output passes what is between the layers as the output itself does, so its part of the output's
    variance is its part of the variance of what enters the second layer, and from there it is multiplied by the
    weights. Errors are taken as independent, from place to place and from channel to channel.

    Args:
        trace: of the model.
        tensors: its parameters, by name.
    """
    found = dict(sums)
    chains = {chain.first: chain.second for chain in find_chains(trace, [s.site for s in sums.values()]).values()}
    for first in sorted(chains, key=lambda key: -sums[key].site.op.index):  # the last one first
        known, reader = sums[first], found[chains[first]]
        matrix = reader.site.matrix(tensors[reader.site.parameter]).double().cpu()
        counts = torch.einsum("go,god->gd", reader.output_share, matrix.square()) * _variances(reader.mean)
        own = known.site.matrix(tensors[known.site.parameter]).double().cpu()
        spread = _output_variances(known.mean, own).flatten()
        if counts.numel() % len(spread):
            continue  # outputs are not what the reader's inputs are made of, one by one
        counts = counts.reshape(len(spread), -1).sum(1) / spread.clamp(min=FLOOR * float(spread.max()) + 1e-300)
        found[first] = replace(known, output_share=counts.reshape(known.output_share.shape))
    return found


def _variances(moment: Tensor) -> Tensor:
    """Of each input, from second moments of inputs and a one (g, D + 1, D + 1)."""
    mean = moment[:, :-1, -1]
    return (moment.diagonal(dim1=1, dim2=2)[:, :-1] - mean.square()).clamp(min=0)


def _output_variances(moment: Tensor, matrix: Tensor) -> Tensor:
    """Of each output of a matrix (g, O, D): (g, O)."""
    mean = moment[:, :-1, -1:]
    about = moment[:, :-1, :-1] - mean @ mean.mT
    return (matrix @ about * matrix).sum(2).clamp(min=0)
