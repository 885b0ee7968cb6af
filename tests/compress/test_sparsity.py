"""The penalty is the group lasso over the units of the graph, and what it presses down costs nothing to remove."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress
from compress import Budget, GroupLasso, PruneError
from tests.compress.helpers import lively
from tests.compress.test_loop import EXAMPLE, Net, data, new_model


def _by_hand(model: nn.Module, graph: compress.ChannelGraph, strength: float, chosen=None) -> float:
    """The formula of the docstring, unit by unit and element by element."""
    parameters = dict(model.named_parameters())
    total = 0.0
    for group in graph.groups:
        squares, sizes = [], []
        for unit in range(group.num_units):
            pieces = [
                parameters[m.parameter].detach().index_select(m.axis, torch.from_numpy(m.indices[unit])).flatten()
                for m in group.members
                if m.parameter in parameters
            ]
            squares.append(float(torch.cat(pieces).square().sum()))
            sizes.append(torch.cat(pieces).numel())
        low, high = min(squares), max(squares)
        for unit, (square, size) in enumerate(zip(squares, sizes, strict=True)):
            weight = 2 ** (4 * (high - square) / (high - low))
            if chosen is not None:
                weight = float(unit in chosen.get(group.name, ()))
            total += weight * (size * square) ** 0.5
    return strength * total


class Flat(nn.Module):
    """Units with several elements on an axis, and two layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.head = nn.Linear(7 * 36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu().flatten(1))


@pytest.mark.parametrize("make", [Net, Flat])
def test_the_penalty_is_the_sum_over_units(make: type[nn.Module]) -> None:
    model = lively(make())
    graph = compress.trace(model, EXAMPLE.double())
    penalty = GroupLasso(graph, strength=0.3)
    assert penalty(model, 1.0).item() == pytest.approx(_by_hand(model, graph, 0.3), rel=1e-9)
    assert penalty(model, 0.25).item() == pytest.approx(0.25 * _by_hand(model, graph, 0.3), rel=1e-9)
    assert penalty(model, 0.0).item() == 0


def test_the_gradient_shrinks_each_unit_as_a_whole() -> None:
    model = lively(Net())
    penalty = GroupLasso(compress.trace(model, EXAMPLE.double()), strength=1.0)
    penalty(model, 1.0).backward()
    for channel in range(9):  # of conv1: one factor for all that goes with it
        pieces = [
            (model.conv1.weight, (channel,)), (model.conv1.bias, (channel,)), (model.norm1.weight, (channel,)),
            (model.conv2.weight, (slice(None), channel)),
        ]  # fmt: skip
        own = torch.cat([p.detach()[at].flatten() for p, at in pieces[:3]])
        slope = torch.cat([p.grad[at].flatten() for p, at in pieces[:3]])
        factor = slope / own
        assert float(factor.min()) > 0
        torch.testing.assert_close(factor, factor[:1].expand_as(factor))


def test_only_what_a_plan_removes_is_pressed() -> None:
    model = lively(Net())
    plan = compress.prune(model, EXAMPLE.double(), budget=Budget(macs=0.5), criterion="l1").plan
    graph = compress.trace(model, EXAMPLE.double())
    penalty = GroupLasso(graph, strength=0.1, plan=plan)
    gone = plan.removed()
    chosen = {g.name: set(gone.get((g.members[0].parameter, g.members[0].axis), ())) for g in graph.groups}
    assert sum(map(len, chosen.values())) == sum(group.num_removed for group in plan.groups)
    assert penalty(model, 1.0).item() == pytest.approx(_by_hand(model, graph, 0.1, chosen), rel=1e-9)


def test_what_was_pressed_costs_less_to_remove() -> None:
    """Two networks train alike, one pressed by the plan: removal moves its outputs far less."""
    plan = compress.prune(new_model(), EXAMPLE, budget=Budget(macs=0.5)).plan
    moved = []
    for strength in (0.0, 0.02):
        model = new_model()
        penalty = GroupLasso(compress.trace(model, EXAMPLE), strength, plan=plan)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        images, labels = data()
        for step in range(60):
            optimizer.zero_grad()
            (F.cross_entropy(model(images), labels) + penalty(model, step / 60)).backward()
            optimizer.step()
        with torch.no_grad():
            before = model.eval()(images)
            moved.append(float((compress.apply(model, plan)(images) - before).square().mean() / before.var()))
    assert moved[1] < 0.05 * moved[0]


def test_a_channel_at_zero_stays_there() -> None:
    model = new_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    GroupLasso(compress.trace(model, EXAMPLE), 1.0)(model, 1.0).backward()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_bad_input_is_named() -> None:
    model = new_model()
    graph = compress.trace(model, EXAMPLE)
    with pytest.raises(PruneError, match="strength is -1"):
        GroupLasso(graph, -1)
    with pytest.raises(PruneError, match="no channel that could be removed"):
        GroupLasso(graph.protecting(["*"]), 0.1)
    with pytest.raises(PruneError, match="removes no unit"):
        GroupLasso(graph, 0.1, plan=compress.PrunePlan())
    small = compress.prune(copy.deepcopy(model), EXAMPLE, budget=Budget(macs=0.5)).model
    with pytest.raises(PruneError, match="trace the model that is trained"):
        GroupLasso(graph, 0.1)(small, 1.0)
