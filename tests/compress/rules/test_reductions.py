import pytest
import torch
from torch import nn

import compress
from tests.compress.helpers import Apply, assert_exact, assert_trains, between, frozen_reasons, image, lively, outputs

# over space, of 11 channels of 9 x 7: exact
FUNCTIONS = {
    "sum": lambda x: x.sum((2, 3), keepdim=True),
    "mean": lambda x: x.mean((-1, -2), keepdim=True),
    "amax": lambda x: x.amax((2, 3), keepdim=True) + x.amin((2, 3), keepdim=True),
    "var": lambda x: x.var((2, 3), keepdim=True) + x.std((2, 3), keepdim=True),
    "var_mean": lambda x: sum(torch.var_mean(x, (2, 3), keepdim=True)) + sum(torch.std_mean(x, (2, 3), keepdim=True)),
    "prod": lambda x: x.prod(3, keepdim=True),
    "logsumexp": lambda x: x.logsumexp((2, 3), keepdim=True),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True) + x.norm(dim=(2, 3), keepdim=True),
    "old norm": lambda x: torch.ops.aten.norm(x, 2, [2, 3], True),
    "any": lambda x: x * (x > 0).any(2, keepdim=True) + (x > 9).all(3, keepdim=True),
    "argmax": lambda x: x + x.argmax(2, keepdim=True) - x.argmin(3, keepdim=True),
    "max with positions": lambda x: x.max(2, keepdim=True).values + x.min(3, keepdim=True).indices,
    "max of two": lambda x: torch.max(x, x * 2) + torch.min(x, -x),
    "median": lambda x: x.median(2, keepdim=True).values,
    "softmax": lambda x: x.softmax(2) + x.log_softmax(-1),
    "safe softmax": lambda x: torch.ops.aten._safe_softmax(x, 3),
    "sort": lambda x: x.sort(3).values + x.sort(2).indices,
    "topk": lambda x: x.topk(3, 2).values,
    "kthvalue": lambda x: x.kthvalue(2, 3, keepdim=True).values,
    "mode": lambda x: x.mode(3, keepdim=True).values,
    "without keeping the axis": lambda x: x.mean(3).amax(2)[:, :, None, None],
}

CASES = {name: (lambda f=f: (between(f), image())) for name, f in FUNCTIONS.items()}


@pytest.mark.parametrize("name", CASES)
def test_removal_equals_masking(name: str) -> None:
    assert_exact(*CASES[name]())


# along the channels: other values for those that stay
MIXING = {
    "mean": lambda x: x * x.mean(1, keepdim=True),
    "sum": lambda x: x + x.sum(1, keepdim=True),
    "amax": lambda x: x - x.amax(1, keepdim=True),
    "std": lambda x: x / x.std(1, keepdim=True),
    "norm": lambda x: x / x.norm(dim=1, keepdim=True),
    "softmax": lambda x: x.softmax(1),
    "everything": lambda x: x * x.sum().tanh(),
}


@pytest.mark.parametrize("name", MIXING)
def test_channels_that_are_mixed_are_not_exact_and_say_so(name: str) -> None:
    model = lively(between(MIXING[name])).float()
    result = compress.prune(model, image(), budget=compress.Budget(channels=0.5))
    assert not result.plan.exact
    assert "over the channels" in result.plan.groups[0].inexact
    assert outputs(result.model, image())[0].shape == outputs(model, image())[0].shape
    assert_trains(result.model, image())
    with pytest.raises(compress.PruneError, match="nothing can be pruned.*not be exact"):
        compress.prune(model, image(), budget=compress.Budget(channels=0.5), exact_only=True)


FREEZING = {
    "argmax": lambda x: x + x.argmax(1, keepdim=True),
    "max with positions": lambda x: x + x.max(1, keepdim=True).indices,
    "median's position": lambda x: x + x.median(1, keepdim=True).indices,
    "sort": lambda x: x.sort(1).values,
    "topk": lambda x: x.topk(11, 1).values,
}


@pytest.mark.parametrize("name", FREEZING)
def test_order_along_the_channels_freezes_them(name: str) -> None:
    graph = compress.trace(between(FREEZING[name]), image())
    assert not graph.groups
    assert "the axis" in frozen_reasons(graph, "0.weight")


def test_positions_that_nobody_uses_freeze_nothing() -> None:
    """``x.max(1)[0]`` is how many write the maximum."""
    for values in (lambda x: x * x.max(1, keepdim=True)[0], lambda x: x * x.median(1, keepdim=True).values):
        (group,) = compress.trace(between(values), image()).groups
        assert "over the channels" in group.inexact


def test_positions_that_are_an_output_freeze() -> None:
    model = nn.Sequential(nn.Conv2d(3, 11, 1), Apply(lambda _, x: x.max(1).indices))
    assert "returns positions" in frozen_reasons(compress.trace(model, image()), "0.weight")


def test_reducing_to_the_output_is_not_exact() -> None:
    """A sum over channels is what the model returns: nothing masks it, so nothing may be called exact."""
    model = nn.Sequential(nn.Conv2d(3, 11, 1), Apply(lambda _, x: x.sum(1)))
    assert all(not group.exact for group in compress.trace(model, image()).groups)
