import pytest
import torch
from torch import nn

from compress import Budget, PruneError, prune
from compress.plan import PlanGroup, PlanMember, PrunePlan
from compress.surgery import apply
from compress.trace import record
from compress.verify import agrees, check_repeatable, culprits
from tests.compress.helpers import image


class Remembers(nn.Module):
    """Keeps something of every run: a tensor, a count, and a buffer that it updates even in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 11, 1), nn.Conv2d(11, 5, 1)
        self.register_buffer("average", torch.zeros(11))
        self.num_calls = 0
        self.last = None

    def forward(self, x):
        x = self.stem(x)
        self.num_calls += 1
        self.last = x
        self.average.lerp_(x.mean((0, 2, 3)), 0.5)
        return self.head(x - self.average[:, None, None])


def _plan(**changes) -> PrunePlan:
    """Channel 2 of 11 of the first layer of ``_model``; ``changes`` make it wrong."""
    members = {
        "0.weight": PlanMember("0.weight", 0, (2,), "producer", 11),
        "0.bias": PlanMember("0.bias", 0, (2,), "carrier", 11),
        "2.weight": PlanMember("2.weight", 1, (2,), "consumer", 11),
    }
    inexact = changes.pop("inexact", "")
    return PrunePlan((PlanGroup("0.weight", 11, 1, tuple({**members, **changes}.values()), inexact),))


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 11, 3), nn.Sigmoid(), nn.Conv2d(11, 5, 1))


def _agrees(model: nn.Module, plan: PrunePlan, inputs: torch.Tensor) -> bool:
    return agrees(model, plan, apply(model, plan), inputs, record(model, inputs))


def test_a_right_plan_agrees() -> None:
    model = _model()
    assert _agrees(model, _plan(), image())


def test_another_channel_in_the_consumer_does_not() -> None:
    model, plan = _model(), _plan(**{"2.weight": PlanMember("2.weight", 1, (3,), "consumer", 11)})
    assert not _agrees(model, plan, image())


def test_a_missing_consumer_does_not() -> None:
    plan = _plan()
    short = PrunePlan((PlanGroup("0.weight", 11, 1, plan.groups[0].members[:2]),))
    model = _model()
    assert not _agrees(model, short, image())


@pytest.mark.parametrize("inexact", ["", "a test"])
def test_another_output_shape_does_not(inexact: str) -> None:
    members = (PlanMember("2.weight", 0, (0,), "producer", 5), PlanMember("2.bias", 0, (0,), "carrier", 5))
    plan = PrunePlan((PlanGroup("2.weight", 5, 1, members, inexact),))
    model = _model()
    assert not _agrees(model, plan, image())


def test_an_inexact_plan_is_only_run() -> None:
    model, plan = _model(), _plan(**{"2.weight": PlanMember("2.weight", 1, (3,), "consumer", 11)}, inexact="a test")
    assert _agrees(model, plan, image())


def test_constant_inputs_do_not_hide_errors() -> None:
    """With zeros as input a network without biases gives zeros, whatever is cut."""
    model = nn.Sequential(nn.Conv2d(3, 11, 3, bias=False), nn.ReLU(), nn.Conv2d(11, 5, 1, bias=False))
    wrong = PrunePlan((PlanGroup("0.weight", 11, 1, (PlanMember("0.weight", 0, (2,), "producer", 11),
                                                   PlanMember("2.weight", 1, (3,), "consumer", 11))),))  # fmt: skip
    assert not _agrees(model, wrong, torch.zeros(2, 3, 9, 7))


def test_running_a_model_to_check_it_leaves_no_trace() -> None:
    model = Remembers()
    model.average.uniform_()
    average = model.average.clone()
    result = prune(model, image(), budget=Budget(channels=0.5))
    assert any(member.parameter == "average" for member in result.plan.members())
    assert torch.equal(model.average, average)
    assert (model.num_calls, model.last) == (0, None)
    assert (result.model.num_calls, result.model.last) == (0, None)
    kept = sorted(set(range(11)) - set(result.plan.removed()[("average", 0)].tolist()))
    assert torch.equal(result.model.average, average[kept])


def test_culprits_are_found_by_halving() -> None:
    bad = {3, 11}
    asked = []

    def holds(parts) -> bool:
        asked.append(tuple(parts))
        return not bad & set(parts)

    assert set(culprits(list(range(16)), holds)) == bad
    assert len(asked) <= 2 * 2 * 4


def test_a_failure_of_the_whole_alone_gives_up_half() -> None:
    assert culprits([0, 1, 2, 3], lambda parts: len(parts) < 4) == [0, 1]


class Draws(nn.Module):
    """Drops units whatever its mode: masked and pruned runs draw different numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(7, 11), nn.Linear(11, 5)

    def forward(self, x):
        return self.b(torch.nn.functional.dropout(self.a(x), 0.5, True))


def test_a_model_that_is_random_in_evaluation_mode_is_named_as_such() -> None:
    with pytest.raises(PruneError, match=r"randomness in evaluation mode \(aten\.\S+\).* self.training"):
        prune(Draws(), torch.zeros(1, 7), budget=Budget(macs=0.5))


def test_random_numbers_that_change_nothing_are_no_error() -> None:
    model = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 5))
    check_repeatable(model, torch.zeros(1, 7), record(Draws(), torch.zeros(1, 7)))
