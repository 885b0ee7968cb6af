import pytest
import torch
from torch import nn

import compress
from compress.overview import layers, overview
from tests.compress.helpers import Apply, between, image, tokens


class Residual(nn.Module):
    """Stem and block share their channels; the head reads them after a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Linear(3, 20), nn.Linear(20, 40), nn.Linear(40, 20)
        self.norm, self.head = nn.LayerNorm(20), nn.Linear(20, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.norm(x + self.outer(self.inner(x).relu())))


def test_a_groups_part_of_the_macs_is_what_goes_with_it() -> None:
    facts = overview(compress.trace(Residual(), image(1, 3)))
    assert facts.macs == 3 * 20 + 2 * 20 * 40 + 20 * 5
    assert [row.group.name for row in facts.groups] == ["stem.weight", "inner.weight"]
    # without the residual channels nothing is left; without the inner ones stem and head are
    assert [row.macs for row in facts.groups] == pytest.approx([1.0, 1600 / 1760])


def test_the_smallest_fraction_is_what_prune_reaches_above_the_floors() -> None:
    graph = compress.trace(Residual(), image(1, 3))
    facts = overview(graph)
    assert facts.smallest == pytest.approx((3 * 2 + 2 * 2 * 4 + 2 * 5) / 1760)  # a floor of a tenth an axis
    assert facts.smallest_exact == pytest.approx((160 + 2 * 20 * 4) / 1760)
    for exact_only, smallest in ((False, facts.smallest), (True, facts.smallest_exact)):
        options = {"exact_only": exact_only}
        result = compress.prune(Residual(), image(1, 3), budget=compress.Budget(macs=smallest + 1e-9), **options)
        assert result.after.macs / result.before.macs == pytest.approx(smallest)
        assert not result.notes
        below = compress.prune(Residual(), image(1, 3), budget=compress.Budget(macs=smallest - 1e-3), **options)
        assert "of their length (usually 10%)" in below.notes[0]


def test_reasons_are_gathered_over_modules() -> None:
    model = nn.Sequential(Residual(), nn.Linear(5, 3), Residual())
    facts = overview(compress.trace(model, image(1, 3)))
    (why,) = facts.inexact
    assert "layer_norm" in why
    assert len(facts.inexact[why]) == 2
    assert {axis.parameter for axis in facts.frozen["output of the model"]} == {"2.head.weight", "2.head.bias"}


def test_operators_without_a_rule_are_counted_once_for_both_modes() -> None:
    model = between(lambda x: torch.logcumsumexp(torch.logcumsumexp(x, -1), -1))
    (gap,) = overview(compress.trace(model, image())).gaps
    assert (gap.operator, gap.why, gap.modules) == ("aten.logcumsumexp.default", "has no rule", ("1",))
    assert gap.calls == 1  # what the first has frozen the second does not touch
    assert overview(compress.trace(between(torch.relu), image())).gaps == ()


def test_a_model_of_which_nothing_can_go() -> None:
    facts = overview(compress.trace(nn.Linear(3, 5), image(7, 3)))
    assert (facts.groups, facts.smallest, facts.smallest_exact) == ((), 1.0, 1.0)


def test_layers_come_as_they_run_with_roles_and_their_part_of_the_macs() -> None:
    class Backwards(nn.Module):
        """Declares its layers from the last to the first, and one that never runs."""

        def __init__(self) -> None:
            super().__init__()
            self.unused, self.head, self.norm, self.stem = (
                nn.Linear(2, 2), nn.Linear(20, 5), nn.BatchNorm1d(20), nn.Linear(3, 20)
            )  # fmt: skip
            self.scale = nn.Parameter(torch.ones(20))

        def forward(self, x):
            return self.head(self.norm(self.stem(x)) * self.scale)

    rows = {layer.name: layer for layer in layers(compress.trace(Backwards(), image(2, 3)))}
    assert list(rows) == ["stem", "norm", "", "head", "unused"]
    assert rows["stem"].macs == pytest.approx(60 / 160)
    assert "producer" in rows["stem"].roles[0]
    assert rows[""].roles == {0: ("carrier",)}
    assert rows["head"].roles == {0: ("consumer",)}
    assert rows["unused"].roles == {}
    assert all("no operator uses" in axis.reason for axis in rows["unused"].frozen)


def test_products_without_parameters_are_layers_and_parametrised_weights_belong_to_theirs() -> None:
    model = nn.Sequential(nn.Linear(4, 6), Apply(lambda _, x: x @ x.mT @ x), nn.Linear(6, 5))
    nn.utils.parametrizations.weight_norm(model[0])
    names = [layer.name for layer in layers(compress.trace(model, tokens(2, 3, 4)))]
    assert names == ["0", "1", "2"]
