import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress
from compress import Budget, PrunePlan, apply, prune
from tests.compress.helpers import Apply, assert_same, image, lively


def _shuffle(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    b, c, h, w = x.shape
    return x.view(b, m.groups, c // m.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Shuffled(nn.Module):
    """Grouped convolution, channel shuffle, depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 18, 1), nn.Conv2d(18, 18, 3, groups=3, padding=1)
        self.shuffle, self.depth = Apply(_shuffle, groups=3), nn.Conv2d(18, 18, 3, groups=18)
        self.head = nn.Conv2d(18, 5, 1)

    def forward(self, x):
        return self.head(self.depth(self.shuffle(self.grouped(self.stem(x)).relu())))


class Padded(nn.Module):
    """Option A shortcuts, two in a row, padded by stored numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.head, self.pads = nn.Linear(32, 5), [4, 8]

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.a(x) + F.pad(x, (0, 0, 0, 0, self.pads[0], self.pads[0]))).relu()
        x = (self.b(x) + F.pad(x, (0, 0, 0, 0, self.pads[1], self.pads[1]))).relu()
        return self.head(x.mean((2, 3)))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 11, 3), nn.BatchNorm2d(11)
        self.a, self.b, self.head = nn.Conv2d(11, 7, 1), nn.Conv2d(18, 13, 3), nn.Linear(13 * 15, 5)

    def forward(self, x):
        x = self.norm(self.stem(x))
        return self.head(self.b(torch.cat([x, self.a(x)], 1)).relu().flatten(1))


@pytest.mark.parametrize("make", [Shuffled, Padded, Mixed])
def test_two_plans_make_one(make) -> None:
    """Applying the joined plan equals applying one after the other, bit by bit, integers included."""
    model = lively(make())
    first = prune(model, image().double(), budget=Budget(params=0.8), criterion="random")
    second = prune(first.model, image().double(), budget=Budget(params=0.8), criterion="random", seed=1)
    joined = first.plan.then(second.plan)
    assert second.after.params < first.after.params
    twice, once = apply(apply(model, first.plan), second.plan), apply(model, joined)
    assert twice.state_dict().keys() == once.state_dict().keys()
    for name, value in twice.state_dict().items():
        assert torch.equal(value, once.state_dict()[name]), name
    assert_same(once, twice, image().double(), 0.0)
    assert getattr(once, "pads", None) == getattr(twice, "pads", None)
    assert joined.exact
    third = prune(once, image().double(), budget=Budget(params=0.9), criterion="random", seed=2).plan
    assert apply(model, joined.then(third)).state_dict().keys() == once.state_dict().keys()


def test_removed_indices_of_the_joined_plan_are_those_of_the_first_model() -> None:
    model = Mixed()
    first = prune(model, image(), budget=Budget(channels=0.7), criterion="random")
    second = prune(first.model, image(), budget=Budget(channels=0.7), criterion="random", seed=3)
    joined = first.plan.then(second.plan).removed()
    left = first.plan.removed()
    for key, later in second.plan.removed().items():
        size = first.plan.then(second.plan).sizes()[key]
        kept = np.setdiff1d(np.arange(size), left.get(key, np.array([], dtype=np.int64)))
        expected = np.union1d(left.get(key, np.array([], dtype=np.int64)), kept[later])
        assert np.array_equal(joined[key], expected)


def test_the_empty_plan_is_neutral() -> None:
    plan = prune(Mixed(), image(), budget=Budget(channels=0.7)).plan
    assert PrunePlan.empty().then(plan).removed().keys() == plan.removed().keys()
    assert plan.then(PrunePlan.empty()) == plan
    assert PrunePlan.empty().exact
    model = Mixed()
    assert_same(apply(model, PrunePlan.empty()), model, image(), 0.0)


def test_plans_that_do_not_follow_each_other() -> None:
    plan = prune(Mixed(), image(), budget=Budget(channels=0.5)).plan
    with pytest.raises(compress.PruneError, match=r"plans do not follow each other: \w+\.\w+ axis 0 has \d+ elements"):
        plan.then(plan)


@pytest.mark.parametrize("make", [Shuffled, Padded, Mixed])
def test_json_round_trip(make) -> None:
    plan = prune(make(), image(), budget=Budget(params=0.7)).plan
    assert PrunePlan.from_json(plan.to_json()) == plan
    json.loads(plan.to_json())


def test_members_have_the_fields_of_the_contract() -> None:
    plan = prune(Mixed(), image(), budget=Budget(channels=0.5)).plan
    names = dict(Mixed().named_parameters()) | dict(Mixed().named_buffers())
    for group in plan.groups:
        assert group.num_removed > 0
        for member in group.members:
            assert member.role in ("producer", "carrier", "consumer")
            assert names[member.parameter].shape[member.axis] == member.size
            assert list(member.removed) == sorted(set(member.removed))
            assert all(0 <= index < member.size for index in member.removed)
            assert all(type(index) is int for index in member.removed)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version":1}', '{"version":1,"groups":[{}],"integers":[]}', "null"])
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(compress.PruneError, match="not a pruning plan") as caught:
        PrunePlan.from_json(text)
    assert "\n" not in str(caught.value)


def test_a_plan_of_a_later_version() -> None:
    with pytest.raises(compress.PruneError, match="format version 99, this prunus reads"):
        PrunePlan.from_json('{"version": 99, "groups": [], "integers": []}')


def test_a_plan_says_which_channels_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(1))
    result = prune(model, image(), budget=Budget(macs=0.6))
    kept = result.plan.kept("0.weight")
    assert kept is not None
    assert torch.equal(result.model[0].weight, model[0].weight[kept])
    assert result.plan.kept("2.weight", axis=1) == kept
    assert result.plan.kept("2.bias") is None
