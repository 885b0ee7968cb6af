"""Widths that are worth it and budgets that are met, on machines whose seconds are made up: nothing here is timed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import compress
import compress.attempt
import compress.timing
from compress import Budget, BudgetError, prune
from compress.cost import macs_of
from compress.select import Selection
from compress.speed import meet_latency
from compress.timing import TimeTable, good_multiples
from compress.trace import record
from tests.compress.helpers import image


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 48, 3), nn.ReLU(), nn.Conv2d(48, 32, 1), nn.Conv2d(32, 5, 1)
    )


def _machine(monkeypatch: pytest.MonkeyPatch, vector: int, power: float = 1.0, fixed: float = 0.0):
    """A machine that works on ``vector`` channels at once, and takes half as long again where some are left over.

    Of a model's seconds ``fixed`` stay whatever goes; the rest falls with the power ``power`` of its operators'."""

    def of_shapes(shapes: list[tuple[int, ...]]) -> float:
        source, weight = shapes[0], shapes[1]
        full = math.prod(source[2:]) * math.prod(weight[2:])
        whole = all(n % vector == 0 or n in (3, 5) for n in weight[:2])
        return full * math.prod(math.ceil(n / vector) * vector for n in weight[:2]) * (1 if whole else 1.5)

    def seconds_of(op, shapes, device):
        return of_shapes([shapes[ref.id] for ref in op.tensors[:2]]) if macs_of(op) else 0.0

    def seconds(model: nn.Module, inputs) -> float:
        ops = [op for op in record(model, inputs, training=False).evaluation if macs_of(op)]
        return sum(of_shapes([ref.shape for ref in op.tensors[:2]]) for op in ops)

    def relative_latency(model, reference, inputs):
        return fixed + (1 - fixed) * (seconds(model, inputs) / seconds(reference, inputs)) ** power

    monkeypatch.setattr(compress.timing, "seconds_of", seconds_of)
    monkeypatch.setattr(compress.attempt, "relative_latency", relative_latency)
    return relative_latency


@pytest.mark.parametrize("vector", [1, 2, 4, 8, 16])
def test_the_multiple_is_that_of_the_machine(vector: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, vector)
    model = _model()
    graph = compress.trace(model, image(1, 3, 20, 20))
    assert list(good_multiples(graph, TimeTable(graph, model)).values()) == [vector] * 3
    result = prune(model, image(1, 3, 20, 20), budget=Budget(macs=0.5), round_to="auto", criterion="random")
    for layer in result.model[:5]:
        if isinstance(layer, nn.Conv2d):
            assert layer.out_channels % vector == 0
    assert result.after.macs <= 0.5 * result.before.macs


@pytest.mark.parametrize("target", [0.8, 0.5, 0.3])
@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_a_latency_budget_is_met_by_the_clock_and_not_by_the_table(
    power: float, target: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _model(), image(1, 3, 20, 20)
    clock = _machine(monkeypatch, 4, power)
    result = prune(model, x, budget=Budget(latency=target))
    assert 0.85 * target < clock(result.model, model, x) <= target
    for layer in result.model[:5]:
        if isinstance(layer, nn.Conv2d):
            assert layer.out_channels % 4 == 0


def test_seconds_are_spent_where_they_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that takes all the time goes first, whatever its multiply-accumulates."""
    model, x = nn.Sequential(nn.Linear(3, 40), nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 5)), image(7, 3)

    def seconds_of(op, shapes, device):
        sizes = [shapes[ref.id] for ref in op.tensors]
        return 100.0 * sizes[-1][0] if op.module == "3" and macs_of(op) else 0.01 * sizes[-1][0]

    monkeypatch.setattr(compress.timing, "seconds_of", seconds_of)
    monkeypatch.setattr(compress.attempt, "relative_latency", lambda pruned, _, __: pruned[3].in_features / 40)
    widths = [
        layer.out_features for layer in prune(model, x, budget=Budget(latency=0.51), criterion="random").model[:3]
    ]
    assert widths[:2] == [40, 40]
    assert 17 <= widths[2] <= 20


def test_a_latency_out_of_reach_names_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _model(), image(1, 3, 20, 20)
    clock = _machine(monkeypatch, 8, fixed=0.1)
    with pytest.raises(BudgetError, match=r"budget latency=0\.05 cannot be reached: at least 0\.\d+ of the") as caught:
        prune(model, x, budget=Budget(latency=0.05))
    smallest = caught.value.smallest
    assert f"{smallest:.3g}" in str(caught.value)
    result = prune(model, x, budget=Budget(latency=smallest * 1.001))
    assert clock(result.model, model, x) == pytest.approx(smallest)


def test_no_result_is_slower_than_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the table is wrong, coarser widths are tried, and what cannot be helped is said."""
    model, x = _model(), image(1, 3, 20, 20)
    _machine(monkeypatch, 1)

    def slow_unless(multiple: int):
        def relative_latency(pruned, reference, inputs):
            return 0.9 if all(pruned[i].out_channels % multiple == 0 for i in (0, 2, 4)) else 1.4

        return relative_latency

    monkeypatch.setattr(compress.attempt, "relative_latency", slow_unless(4))
    result = prune(model, x, budget=Budget(macs=0.5), round_to="auto", criterion="random")
    assert all(result.model[i].out_channels % 4 == 0 for i in (0, 2, 4))
    assert not result.notes
    monkeypatch.setattr(compress.attempt, "relative_latency", slow_unless(1000))
    result = prune(model, x, budget=Budget(macs=0.5), round_to="auto", criterion="random")
    assert result.after.macs <= 0.5 * result.before.macs
    assert "takes 1.40 x the dense model's seconds" in result.notes[0]


def test_a_table_at_its_own_widths_is_the_sum_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, 1)
    model, x = _model(), image(1, 3, 20, 20)
    graph = compress.trace(model, x)
    table = TimeTable(graph, model)
    for part in (1.0, 0.75, 0.5, 0.25, 0.6):  # seconds are bilinear here, so that interpolation is exact
        kept = np.maximum(np.round(graph.sizes * part / 16), 1).astype(np.int64) * 16
        widths = [3, *kept.tolist(), 5]
        inputs = [20 * 20 * 9, 18 * 18 * 9, 16 * 16, 16 * 16]
        expected = sum(a * b * n for a, b, n in zip(widths, widths[1:], inputs, strict=False))
        assert table(kept) == pytest.approx(expected)


def test_real_operators_are_timed_at_any_width() -> None:
    """Depthwise, grouped and transposed convolutions, norms and concatenations run with fewer channels."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.depthwise = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16)
            self.grouped, self.norm = nn.Conv2d(16, 24, 1, groups=4), nn.BatchNorm2d(24)
            self.up, self.head = nn.ConvTranspose2d(24, 8, 2), nn.Linear(32, 5)

        def forward(self, x):
            x = self.norm(self.grouped(self.depthwise(self.stem(x)))).relu()
            return self.head(torch.cat([x.mean((2, 3)), self.up(x).mean((2, 3))], 1))

    model, x = Mixed(), image(2, 3, 12, 12)
    graph = compress.trace(model, x)
    table = TimeTable(graph, model)
    for op in table._ops:
        for part in (1.0, 0.5):
            alone = op.seconds([part] * len(op.live), torch.device("cpu"))
            assert alone > 0 or "view" in str(op.op.func), op.op
    assert 0 < table(graph.sizes // 2) < math.inf


def test_a_model_without_values_takes_no_time() -> None:
    with torch.device("meta"):
        model = _model()
    for options in ({"budget": Budget(latency=0.5)}, {"budget": Budget(macs=0.5), "round_to": "auto"}):
        with pytest.raises(compress.PruneError, match="meta device takes no time"):
            prune(model, image(1, 3, 20, 20), criterion="random", **options)


def test_all_that_may_stay_stays() -> None:
    for options in ({"budget": Budget(latency=1.0)}, {"budget": Budget(macs=1.0), "round_to": "auto"}):
        assert prune(_model(), image(1, 3, 20, 20), **options).plan == compress.PrunePlan.empty()


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_search_ends_below_the_target_and_close_to_it(power: float, noise: float) -> None:
    """Selections are numbers here: predicted seconds p are measured as p ** power, and never twice alike."""
    generator = np.random.default_rng(0)

    def choose(aim: float) -> Selection:
        if aim < 0.1:
            raise BudgetError("too small", smallest=0.1)
        return Selection({}, {0: int(1000 * aim)})

    def measured(selection: Selection) -> float:
        return (selection.lumps[0] / 1000) ** power * (1 + noise * generator.uniform(-1, 1))

    for target in (0.9, 0.6, 0.35):
        found = (meet_latency(choose, measured, target).lumps[0] / 1000) ** power
        assert 0.9 * target < found <= (1 + noise) * target + 1e-9


def test_measurements_that_mean_nothing_are_an_error() -> None:
    choose = lambda aim: Selection({}, {0: int(1000 * aim)})  # noqa: E731
    with pytest.raises(BudgetError, match="was not met in 10 attempts: measurements on this machine vary too much"):
        meet_latency(choose, lambda _: 1.5, 0.5)
