"""Plans of several steps, and what apply, save and load ask of a plan of any kind."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import compress
from compress import Budget, Factor, FactorPlan, PruneError, ShrinkPlan
from compress.plans import PLANS, plan_kind, read_plan
from tests.compress.helpers import assert_same, image


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 3)
    ).eval()


@pytest.fixture
def plan() -> ShrinkPlan:
    """A pruning, and a factorisation of a layer that it made narrower."""
    pruned = compress.prune(_net(), image(), budget=Budget(macs=0.6))
    shape = tuple(pruned.model[3].weight.shape)
    assert shape != (12, 8, 3, 3)
    return ShrinkPlan((pruned.plan, FactorPlan((Factor("3", "spatial", (5,), "vertical", shape, 0.1),))))


def test_steps_follow_each_other_and_survive_json_and_files(plan: ShrinkPlan, tmp_path) -> None:
    net = _net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    made = compress.apply(net, plan)
    assert_same(made, compress.apply(compress.apply(net, plan.steps[0]), plan.steps[1]), image(), 0.0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert ShrinkPlan.from_json(plan.to_json()) == plan == read_plan(plan.to_json())
    compress.save(made, tmp_path / "x.safetensors", plan=plan)
    assert_same(compress.load(_net(), tmp_path / "x.safetensors"), made, image(), 0.0)
    assert compress.apply(net, plan, inplace=True) is net
    assert_same(net, made, image(), 0.0)
    assert isinstance(compress.unfactorize(made)[3], nn.Conv2d)


def test_no_step_at_all_gives_a_copy() -> None:
    net = _net()
    made = compress.apply(net, ShrinkPlan())
    assert made is not net
    assert_same(made, net, image(), 0.0)


def test_what_cannot_be_done_is_said(plan: ShrinkPlan) -> None:
    net = _net()
    with pytest.raises(PruneError, match="only pruning can be masked, not a ShrinkPlan"):
        compress.mask(net, plan)
    with pytest.raises(PruneError, match="an optimizer can follow pruning alone"):
        compress.apply(net, plan, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(PruneError, match="is it another class"):
        compress.apply(nn.ReLU(), plan)
    with pytest.raises(PruneError, match="apply it to an unpruned instance"):
        compress.apply(compress.apply(net, plan.steps[0]), plan)
    with pytest.raises(PruneError, match="not a plan of several steps but 'prune'"):
        ShrinkPlan.from_json(plan.steps[0].to_json())
    with pytest.raises(PruneError, match="'knit' is unknown"):
        ShrinkPlan.from_json(plan.to_json().replace('"factorize"', '"knit"'))
    with pytest.raises(PruneError, match="version 2"):
        ShrinkPlan.from_json(plan.to_json().replace('"version":1', '"version":2', 1))
    for text in ("", "3", '{"kind":"shrink","version":1}', '{"kind":"shrink","version":1,"steps":[4]}'):
        with pytest.raises(PruneError, match="not a plan"):
            ShrinkPlan.from_json(text)


def test_documents_that_name_no_kind_are_prunings(plan: ShrinkPlan) -> None:
    data = json.loads(plan.steps[0].to_json())
    del data["kind"]
    assert read_plan(json.dumps(data)) == plan.steps[0]


def test_a_plan_of_another_package_is_applied_saved_and_loaded(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.plans.PLANS", dict(PLANS))

    @plan_kind
    @dataclass(frozen=True)
    class Silenced:
        """The first layer gives nothing."""

        kind: ClassVar[str] = "silenced"

        def carry_out(self, model: nn.Module, *, inplace: bool = False, empty: bool = False) -> nn.Module:
            made = model if inplace else _net()
            made[0] = nn.Identity()
            made[1] = nn.Conv2d(3, 8, 3)
            return made

        def to_json(self) -> str:
            return '{"kind":"silenced"}'

        @classmethod
        def from_json(cls, text: str) -> "Silenced":
            return cls()

    made = compress.apply(_net(), Silenced())
    compress.save(made, tmp_path / "x.safetensors", plan=ShrinkPlan((Silenced(),)))
    assert_same(compress.load(_net(), tmp_path / "x.safetensors"), made, image(), 0.0)
