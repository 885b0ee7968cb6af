"""Magnitude of the weights that make a channel (Li et al. 2017, arXiv 1608.08710, section 3.1)."""

from compress.channels import ChannelGroup
from compress.evidence import Evidence, Values


def l1(group: ChannelGroup, evidence: Evidence) -> Values:
    """Mean absolute weight over all producers of each channel."""
    return evidence.weight_mean(group, 1)


def l2(group: ChannelGroup, evidence: Evidence) -> Values:
    """Mean squared weight over all producers of each channel."""
    return evidence.weight_mean(group, 2)
