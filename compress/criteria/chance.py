"""The baseline that every other criterion must beat."""

import zlib

import numpy as np

from compress.channels import ChannelGroup
from compress.evidence import Evidence, Values


def random(group: ChannelGroup, evidence: Evidence) -> Values:
    """Uniform in [0, 1), decided by the seed and the group's name alone."""
    return np.random.default_rng([evidence.seed, zlib.crc32(group.name.encode()), group.index]).random(group.num_units)
