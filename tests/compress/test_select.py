import numpy as np
import pytest
from torch import nn

import compress
from compress.errors import BudgetError, PruneError
from compress.removal import by_score
from compress.select import FLOOR, SelectOptions, select
from tests.compress.helpers import Apply, image


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 20, 3), nn.ReLU(), nn.Conv2d(20, 5, 1))


def _select(scores, target: float, **options):
    """Budget on channels of a graph with 40 and 20 units."""
    graph = compress.trace(_model(), image())
    total = int(graph.sizes.sum())
    removals = [by_score(group, values) for group, values in zip(graph.groups, scores, strict=True)]
    return select(graph, removals, lambda kept: kept.sum() / total, target, SelectOptions(**options))


def _draw(seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.random(40), generator.random(20)]


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("target", [0.9, 0.5, 0.25, 1.0])
def test_the_least_important_units_of_each_group_go(scope: str, target: float) -> None:
    scores = _draw(0)
    selection = _select(scores, target, scope=scope)
    removed = {group: units for group, units in selection.units.items() if len(units)}
    assert sum(len(units) for units in removed.values()) == round(60 * (1 - target))
    for group, units in removed.items():
        assert set(units.tolist()) == set(np.argsort(scores[group])[: len(units)].tolist())
        assert (np.diff(units) > 0).all()


def test_uniform_takes_the_same_part_of_every_group() -> None:
    selection = _select(_draw(1), 0.5, scope="uniform")
    assert [len(selection.units[g]) for g in (0, 1)] == [20, 10]


def test_global_compares_over_groups() -> None:
    scores = [np.linspace(10, 11, 40), np.concatenate([np.full(10, 0.001), np.full(10, 1.0)])]
    selection = _select(scores, 50 / 60)
    assert len(selection.units.get(0, [])) == 0
    assert set(selection.units[1].tolist()) == set(range(10))


def test_scores_are_compared_relative_to_their_group() -> None:
    """Weights of one layer may be a hundred times those of another."""
    scores = _draw(2)
    scaled = [scores[0] * 100, scores[1]]
    one, other = _select(scores, 0.6), _select(scaled, 0.6)
    assert all(np.array_equal(one.units[g], other.units[g]) for g in (0, 1))


def test_no_axis_falls_below_the_floor() -> None:
    scores = [np.full(40, 1e-9), np.linspace(1, 2, 20)]
    smallest = FLOOR + 0.001
    selection = _select(scores, smallest)
    assert len(selection.units[0]) == 36
    assert len(selection.units[1]) == 18


def test_floors_give_way_to_a_budget_that_needs_it_step_by_step() -> None:
    assert _select(_draw(3), FLOOR).floor == FLOOR
    for target, floor in ((0.09, 0.05), (0.045, 0.02)):
        selection = _select(_draw(3), target)
        kept = [n - len(selection.units[g]) for g, n in enumerate((40, 20))]
        assert selection.floor == floor
        assert sum(kept) / 60 <= target
        assert all(n >= floor * size for n, size in zip(kept, (40, 20), strict=True))


def test_a_lower_floor_is_noted() -> None:
    result = compress.prune(_model(), image(), budget=compress.Budget(channels=0.08))
    assert any("down to 5% of their length (usually 10%)" in note for note in result.notes)
    assert not compress.prune(_model(), image(), budget=compress.Budget(channels=0.5)).notes


@pytest.mark.parametrize(("min_channels", "left"), [(1, (1, 1)), (3, (3, 3)), (7, (7, 7)), (30, (30, 20))])
def test_the_smallest_that_can_be_reached_is_named_and_reachable(min_channels: int, left: tuple[int, int]) -> None:
    with pytest.raises(
        BudgetError, match=rf"at least {sum(left) / 60:.3g} remains with min_channels={min_channels}"
    ) as caught:
        _select(_draw(3), 0.01, min_channels=min_channels)
    assert "\n" not in str(caught.value)
    selection = _select(_draw(3), sum(left) / 60 + 1e-9, min_channels=min_channels)
    kept = tuple(n - len(selection.units.get(g, ())) for g, n in enumerate((40, 20)))
    assert kept == left


@pytest.mark.parametrize("round_to", [2, 4, 5, 8])
@pytest.mark.parametrize("target", [0.8, 0.5])
def test_widths_become_multiples(round_to: int, target: float) -> None:
    result = compress.prune(_model(), image(), budget=compress.Budget(channels=target), round_to=round_to)
    widths = [layer.out_channels for layer in result.model if isinstance(layer, nn.Conv2d)][:2]
    for width, dense in zip(widths, (40, 20), strict=True):
        assert width == dense or width % round_to == 0
    assert widths != [40, 20]


def test_a_width_that_is_no_multiple_becomes_one_or_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 13, 1), nn.Conv2d(13, 5, 1))
    result = compress.prune(model, image(), budget=compress.Budget(channels=0.7), round_to=4)
    assert result.model[0].out_channels == 8


def test_equal_scores_are_taken_in_order() -> None:
    one, other = (_select([np.ones(40), np.ones(20)], 0.5) for _ in range(2))
    assert one.units.keys() == other.units.keys()
    assert all(np.array_equal(one.units[g], other.units[g]) for g in one.units)


def test_negative_scores_are_scores() -> None:
    selection = _select([np.linspace(-3, -1, 40), np.linspace(-2, 5, 20)], 0.5)
    assert sum(len(units) for units in selection.units.values()) == 30


def test_lumps_go_whole() -> None:
    """Two halves of a chunk lose the same number."""
    model = nn.Sequential(
        nn.Conv2d(3, 22, 1), Apply(lambda _, x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1]), nn.Conv2d(11, 5, 1)
    )
    result = compress.prune(model, image(), budget=compress.Budget(channels=0.5), criterion="random")
    assert result.model[0].out_channels == 2 * result.model[2].in_channels < 22


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scope": "local"}, "scope='local' is unknown: choose one of global, uniform"),
        ({"round_to": 0}, "round_to=0 must be at least 1"),
        ({"min_channels": 0}, "min_channels=0 must be at least 1"),
    ],
)
def test_options_out_of_range(options, match: str) -> None:
    with pytest.raises(PruneError, match=match):
        SelectOptions(**options)


def test_what_saves_nothing_goes_last() -> None:
    """A head that runs in training only costs no multiply-accumulates when the model is used."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(3, 20), nn.Linear(20, 5)
            self.extra = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 5))

        def forward(self, x):
            x = self.stem(x)
            return (self.head(x), self.extra(x)) if self.training else self.head(x)

    result = compress.prune(Auxiliary(), image(7, 3), budget=compress.Budget(macs=0.5))
    assert [group.name for group in result.plan.groups] == ["stem.weight"]
    assert result.model.extra[0].out_features == 20


def test_a_width_that_is_no_number_is_refused() -> None:
    with pytest.raises(compress.PruneError, match=r"round_to='eight' is no width: give a whole number, such as 8"):
        compress.prune(_model(), image(), budget=compress.Budget(macs=0.5), round_to="eight")
