import copy
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import compress
from compress import PruneError, sensitivity
from compress.criteria import CRITERIA
from compress.evidence import Evidence
from compress.sensitivity import CURVE, EVENTS, POINTS, TABLE
from tests.compress.helpers import image, lively, outputs
from tests.compress.test_pruning import Net

X = image(4, 3, 9, 7).double()


def _evaluate(model: nn.Module) -> float:
    """Not an accuracy, but as good: a number that changes with every channel."""
    with torch.no_grad():
        return float(model(X).square().mean())


def _run(folder: Path, model: nn.Module | None = None, **options):
    if model is None:
        torch.manual_seed(0)
        model = lively(Net())
    return sensitivity(model, X, **({"evaluate": _evaluate, "folder": folder, "ratios": (0.7, 0.3)} | options))


def test_every_point_is_that_of_the_pruned_model(tmp_path: Path) -> None:
    """For an exact group, masking is pruning: a plan made by hand from the scores gives the same number."""
    model = lively(Net())
    graph = compress.trace(model, X)
    dense, *points = _run(tmp_path, model, criteria=("l1", "fpgm"))
    assert dense.accuracy == _evaluate(model.eval())
    assert len(points) == 2 * len(graph.groups) * 2
    found = iter(points)
    for criterion in ("l1", "fpgm"):
        for group in graph.groups:
            scores = CRITERIA[criterion](group, Evidence(model, graph))
            for ratio in (0.7, 0.3):
                point = next(found)
                left = round(ratio * group.num_units)
                assert (point.criterion, point.group, point.ratio) == (criterion, group.name, ratio)
                assert (point.kept, point.total) == (left, group.num_units)
                gone = np.argsort(scores)[: group.num_units - left]
                plan = compress.plan.make_plan(graph, {group.index: gone}, {})
                pruned = compress.apply(model, plan).eval()
                assert point.accuracy == pytest.approx(_evaluate(pruned), rel=1e-9)
                assert point.accuracy != dense.accuracy


def test_the_model_is_as_before(tmp_path: Path) -> None:
    model = lively(Net()).train()
    before, expected = copy.deepcopy(model.state_dict()), outputs(model, X)
    _run(tmp_path, model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(outputs(model, X)[0], expected[0])


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole")
    calls = []

    def interrupted(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return _evaluate(model)

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "a", evaluate=interrupted)
    assert not (tmp_path / "a" / TABLE).exists()
    with (tmp_path / "a" / POINTS).open("a") as file:
        file.write('{"criterion": "l2", "gro')  # as the last line of a process that was killed while it wrote
    seen = []
    again = _run(tmp_path / "a", evaluate=interrupted, on_point=lambda point, number: seen.append((point, number)))
    assert again == whole
    assert len(calls) == 6 + len(whole) - 5
    assert seen == [(point, len(whole)) for point in whole]
    assert _run(tmp_path / "a", evaluate=lambda _: 1 / 0) == whole, "a complete run evaluates nothing"
    lines = [json.loads(line) for line in (tmp_path / "a" / POINTS).read_text().splitlines()]
    assert [line["accuracy"] for line in lines] == [point.accuracy for point in whole]


def test_results_as_table_picture_and_events(tmp_path: Path) -> None:
    points = _run(tmp_path, criteria=("l2", "random"))
    with (tmp_path / TABLE).open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [point.accuracy for point in points]
    assert [row["group"] for row in rows] == [point.group for point in points]
    assert (tmp_path / CURVE).read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / EVENTS))
    events.Reload()
    curve = {event.step: event.value for event in events.Scalars("sensitivity/l2/stem.weight")}
    assert curve == pytest.approx({round(100 * p.ratio): p.accuracy for p in points
                                   if (p.criterion, p.group) == ("l2", "stem.weight")})  # fmt: skip


def test_data_are_read_once_for_all_criteria(tmp_path: Path) -> None:
    class Counted(list):
        reads = 0

        def __iter__(self):
            Counted.reads += 1
            return super().__iter__()

    batches = Counted([(X, torch.tensor([0, 1, 2, 3]))])
    points = _run(tmp_path, criteria=("mean_activation", "nonzero", "l1"), calibration=batches)
    assert {point.criterion for point in points} == {"", "mean_activation", "nonzero", "l1"}
    assert Counted.reads == 2, "one to see that it is no generator, one to collect"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ratios": ()}, "give parts to keep above 0 and below 1"),
        ({"ratios": (0.5, 1.0)}, "give parts to keep above 0 and below 1"),
        ({"criteria": ()}, "criteria are none"),
        ({"criteria": ("l1", "l1")}, "criteria are l1, l1; give each once"),
        ({"criteria": ("l3",)}, "criterion 'l3' is unknown"),
        ({"criteria": ("nonzero",)}, "criterion 'nonzero' needs data"),
        ({"model": nn.Linear(7, 5).double()}, "no channel of this model can be removed"),
    ],
)
def test_bad_options_leave_no_folder(options, match: str, tmp_path: Path) -> None:
    with pytest.raises(PruneError, match=match):
        _run(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    _run(tmp_path)
    with pytest.raises(PruneError, match="holds another run: ratios"):
        _run(tmp_path, ratios=(0.5,))
    with pytest.raises(PruneError, match="holds another run: weights"):
        _run(tmp_path, model=lively(Net(), 3))


def test_groups_of_one_name_are_told_apart(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(3, 12), nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x):
            left, right = self.stem(x).chunk(2, 1)
            return self.a(left).relu() + self.b(right)

    model, x = Halves(), image(4, 3)
    names = [group.name for group in compress.trace(model, x).groups]
    assert names == ["stem.weight", "stem.weight"]
    points = sensitivity(model, x, evaluate=lambda m: float(m(x).detach().sum()), folder=tmp_path, ratios=(0.5,))
    assert [point.group for point in points] == ["", "stem.weight#0", "stem.weight#1"]
    assert len({point.accuracy for point in points}) == 3
