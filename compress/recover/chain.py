"""Layers that feed one other layer and nothing else, such as the first convolution of a residual block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compress.landing import NORMS, RESHAPES
from compress.recorder import Op, TensorRef, Trace
from compress.rules.registry import base_name
from compress.sites import Key, Site
from compress.uses import Uses


@dataclass(frozen=True)
class Chain:
    """What ``first`` gives reaches ``second``, and nothing else, by ``path``: operators on one element at a time."""

    first: Key
    second: Key
    path: tuple[Op, ...]


def find_chains(trace: Trace, sites: Sequence[Site]) -> dict[Key, Chain]:
    """The chains of a trace by their second site."""
    uses = Uses(trace)
    weights = {ref.id for ref in trace.parameters.values()}
    readers = {site.op.index: site for site in sites}
    chains = {}
    for site in sites:
        path, ref, maker = list[Op](), site.result, site.op
        while (op := uses.only_reader(ref, maker)) is not None:
            reader = readers.get(op.index)
            if reader is not None:
                if reader.source == ref and reader.parameter != site.parameter:
                    chains[reader.key] = Chain(site.key, reader.key, tuple(path))
                break
            if not _by_element(op, ref, weights):
                break
            path.append(op)
            ref, maker = op.outputs[0], op
    return chains


def _by_element(op: Op, ref: TensorRef, weights: set[int]) -> bool:
    name = base_name(op)
    alone = all(t.id == ref.id or t.id in weights for t in op.tensors)
    if name in NORMS:
        return alone and op.arguments["input"] == ref and not op.arguments.get("training")
    pointwise = torch.Tag.pointwise in op.func.tags and op.outputs[0].shape == ref.shape
    return alone and (pointwise or name in RESHAPES)
