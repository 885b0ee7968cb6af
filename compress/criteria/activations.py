"""Statistics of a channel where its consumers read it, after activation and normalisation."""

from compress.channels import ChannelGroup
from compress.evidence import Evidence, Values


def mean_activation(group: ChannelGroup, evidence: Evidence) -> Values:
    """Mean absolute activation over all calibration data (Molchanov et al. 2017, arXiv 1611.06440, section 2.2)."""
    return evidence.activation_mean(group, "magnitude")


def nonzero(group: ChannelGroup, evidence: Evidence) -> Values:
    """How often the channel is not zero, in [0, 1]: 1 - APoZ (Hu et al. 2016, arXiv 1607.03250, equation 1)."""
    return evidence.activation_mean(group, "nonzero")


mean_activation.needs = {"activations"}  # type: ignore[attr-defined]
nonzero.needs = {"activations"}  # type: ignore[attr-defined]
