"""How much the loss changes, to first order, when a channel goes."""

from compress.channels import ChannelGroup
from compress.evidence import Evidence, Values


def taylor(group: ChannelGroup, evidence: Evidence) -> Values:
    """``(sum of gradient x weight) ** 2`` over the slices that read the channel, averaged over the batches.

    Molchanov et al. (2019), arXiv 1906.10771, equation 8 (the group's joint contribution), with the set of weights that
    pruning silences. That sum is the gradient x activation of the channel where it is read, as in Molchanov et al.
    (2017), arXiv 1611.06440, equation 7. Smaller batches give more samples of it: 16 to 64 examples serve well.
    """
    return evidence.first_order(group)


taylor.needs = {"gradients"}  # type: ignore[attr-defined]
