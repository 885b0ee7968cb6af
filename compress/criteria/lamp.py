"""Magnitude relative to what is left of the layer."""

import numpy as np

from compress.channels import ChannelGroup
from compress.evidence import Evidence, Values


def lamp(group: ChannelGroup, evidence: Evidence) -> Values:
    """The channel's squared weights as a part of those of all channels that are not smaller, in [0, 1].

    Lee et al. (2021), arXiv 2010.07611, equation 3, for channels: the largest scores 1, so that no layer is emptied
    by a comparison over layers. Of equal channels the earlier goes first.
    """
    squares = evidence.weight_mean(group, 2)
    order = np.argsort(squares, kind="stable")
    left = np.cumsum(squares[order][::-1])[::-1]
    scores = np.empty_like(squares)
    scores[order] = np.divide(squares[order], left, out=np.zeros_like(left), where=left > 0)
    return scores
