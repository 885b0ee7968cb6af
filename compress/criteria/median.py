"""How replaceable a channel is by the others of its group."""

import numpy as np

from compress.channels import ChannelGroup
from compress.evidence import Evidence, Values


def fpgm(group: ChannelGroup, evidence: Evidence) -> Values:
    """Mean Euclidean distance of a channel's weights to those of the group's channels (its own, 0, included).

    The channel with the least of it lies closest to the geometric median of all, and the others can stand in for it
    (He et al. 2019, arXiv 1811.00250, equations 4 to 6). All weights that make the channel are one vector.
    """
    squares = np.zeros((group.num_units, group.num_units))
    for rows in evidence.rows(group):
        gram = (rows @ rows.T).cpu().numpy()
        lengths = np.diagonal(gram)
        squares += lengths[:, None] + lengths[None, :] - 2 * gram
    np.fill_diagonal(squares, 0)
    distances: Values = np.sqrt(np.maximum(squares, 0)).mean(axis=1)
    return distances
