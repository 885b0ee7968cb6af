"""Scale factors of batch norm, which training with an L1 penalty drives to zero where a channel is not needed."""

import numpy as np

from compress.channels import ChannelGroup
from compress.criteria.weights import l1
from compress.evidence import Evidence, Values
from compress.recorder import TensorRef


def bn_scale(group: ChannelGroup, evidence: Evidence) -> Values:
    """Mean ``|gamma|`` over the batch norms that the channel passes (Liu et al. 2017, arXiv 1708.06519, section 3).

    A group without batch norm is judged by `l1`: the weights that make a channel are then what scales it.
    """
    names = {name for name, ref in evidence.graph.trace.parameters.items() if ref.id in _scales(evidence)}
    total, count = np.zeros(group.num_units), 0
    for member, tensor in evidence.members(group):
        if member.parameter in names:
            total += tensor.double().abs().cpu().numpy()[member.indices].sum(axis=1)
            count += member.indices.shape[1]
    return total / count if count else l1(group, evidence)


def _scales(evidence: Evidence) -> set[int]:
    """Ids of the tensors that some batch norm scales by; functional calls count as well."""
    found = (op.arguments.get("weight") for op in evidence.graph.trace.evaluation if "batch_norm" in str(op.func))
    return {weight.id for weight in found if isinstance(weight, TensorRef)}
