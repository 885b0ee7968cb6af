import json
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from benchmarks import bench_school
from benchmarks.school_network import NetworkRegressor
from mtl.linear import MeanRegularizedRidge, PooledRidge, TraceNormRegressor


@pytest.fixture
def school(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    cells = np.empty((2, 1, 4), object)
    for index in range(4):
        features = random.integers(0, 2, (30, 5))
        cells[0, 0, index] = features
        cells[1, 0, index] = features.sum(1) + index + random.normal(size=30)
    savemat(tmp_path / "school.mat", {"X": cells[0], "Y": cells[1]})
    return tmp_path / "school.mat"


def test_says_what_it_needs_and_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert bench_school.main(["--output", str(output)]) == 0
    assert "skipped: bench_school.py needs --data" in capsys.readouterr().err
    assert not output.exists()
    assert bench_school.main(["--data", str(tmp_path / "none.mat"), "--output", str(output)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_every_model_is_a_row_and_finished_splits_are_kept(
    school: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {
        "ridge to the mean": lambda: MeanRegularizedRidge("cv"),
        "trace norm": lambda: TraceNormRegressor("weights", "cv"),
    }
    monkeypatch.setattr(bench_school, "MODELS", models)
    monkeypatch.setattr(bench_school, "AVERAGED", tuple(models))
    output = tmp_path / "result.json"
    flags = ["--data", str(school), "--train", "0.5", "--output", str(output)]
    assert bench_school.main([*flags, "--splits", "1"]) == 0
    first = json.loads(output.read_text())["rows"]
    assert [row["model"] for row in first] == [*models, "average"]
    assert bench_school.main([*flags, "--splits", "2"]) == 0
    document = json.loads(output.read_text())
    assert document["rows"][:3] == first
    assert len(document["rows"]) == 6
    monkeypatch.setitem(models, "pooled ridge", lambda: PooledRidge("cv"))
    assert bench_school.main([*flags, "--splits", "2"]) == 0
    added = json.loads(output.read_text())["rows"]
    assert added[:6] == document["rows"]
    assert [(row["model"], row["split"]) for row in added[6:]] == [("pooled ridge", 0), ("pooled ridge", 1)]
    for line in document["summary"]:
        assert line["splits"] == 2
        assert line["within"] < line["explained"] < 1
    assert str(tmp_path) not in output.read_text()


def test_the_split_takes_its_part_of_every_school() -> None:
    school = np.repeat(np.arange(3), (4, 40, 2))
    chosen = bench_school.draw(school, 0.25, seed=0)
    assert np.bincount(school[chosen]).tolist() == [1, 10, 1]
    assert not np.array_equal(chosen, bench_school.draw(school, 0.25, seed=1))


def test_explained_variance_by_hand() -> None:
    scores, school = np.array([1.0, 3.0, 7.0, 9.0]), np.array([0, 0, 1, 1])
    found = bench_school.explained(scores, np.array([2.0, 2.0, 8.0, 9.0]), school)
    assert found == {"explained": pytest.approx(1 - 3 / 40), "within": pytest.approx(1 - 3 / 4)}


def test_the_network_knows_schools_apart_as_far_as_its_prior_lets_it() -> None:
    random = np.random.default_rng(0)
    school = np.repeat(np.arange(4), 60)
    features = random.normal(size=(240, 3))
    scores = 20 + 4 * np.sin(features[:, 0]) + 3 * (school - 1.5) + random.normal(size=240)
    for deviation, low, high in ((1.0, 0.85, 1.0), (1e-3, 0.0, 0.6)):
        model = NetworkRegressor(deviation=deviation, epochs=60, members=2).fit(features[::2], scores[::2], school[::2])
        assert low < model.score(features[1::2], scores[1::2], school[1::2]) < high
