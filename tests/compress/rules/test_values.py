"""Sizes that become values: removing channels would change what is computed, so they may not go as if exact."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import compress
from tests.compress.helpers import assert_exact, between, image, lively

# x has 11 channels; each uses their number as a value in a way that the trace sees
SEEN = {
    "power": lambda x: x * x.shape[1] ** -0.5,
    "square root": lambda x: x / math.sqrt(x.shape[1]),
    "divide": lambda x: x / x.shape[1],
    "negative": lambda x: x * (3 - x.shape[1]),
    "multiply": lambda x: x * x.size(1),
    "float": lambda x: x * float(x.shape[1]),
    "half": lambda x: x * (x.size(1) * 0.5),
    "new tensor": lambda x: x / x.new_tensor(x.shape[1]),
    "tensor": lambda x: x / torch.tensor(x.shape[1]),
    "full": lambda x: x / torch.full((1,), x.shape[1]),
    "range": lambda x: x * torch.arange(x.shape[1])[-1],
    "comparison": lambda x: x * 2 if x.shape[1] == 11 else x,
}
# and in a way that only running the pruned model can show
HIDDEN = {
    "numpy": lambda x: x / float(np.sqrt(x.size(1))),
    "reciprocal": lambda x: x * (1.0 / x.size(1)),
    "number of elements": lambda x: x / x.numel(),
    "length": lambda x: x / len(x[0]),
    "text": lambda x: x * int(str(x.shape[1])),
    "order": lambda x: x * 2 if x.shape[1] > 10 else x,
}


@pytest.mark.parametrize("name", SEEN)
def test_a_size_used_as_a_value_freezes(name: str) -> None:
    graph = compress.trace(between(SEEN[name]), image())
    assert not any(group.exact for group in graph.groups)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_tracing_cannot_see_verification_does(name: str) -> None:
    """The group is given up with a note, and what is left is exact."""
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 13, 1))
    model.add_module("neck", nn.Conv2d(13, 3, 1))
    model.add_module("body", between(HIDDEN[name]))
    result = assert_exact(model, image(), compress.Budget(channels=0.8), unverified=True)
    assert any("did not verify: body.0.weight" in note for note in result.notes)
    assert result.model.body[0].out_channels == 11
    assert result.model.stem.out_channels < 13
    only = lively(between(HIDDEN[name])).float()
    with pytest.raises(compress.PruneError, match="nothing can be pruned: .*did not verify"):
        compress.prune(only, image(), budget=compress.Budget(channels=0.5))


def test_sizes_of_axes_that_stay_may_be_values() -> None:
    assert_exact(between(lambda x: x / x.shape[-1] + x.shape[2] ** -0.5), image())
