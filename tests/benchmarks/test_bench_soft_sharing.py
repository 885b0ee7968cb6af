import json
from pathlib import Path

from benchmarks import bench_soft_sharing


def test_measures_every_part(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    flags = ["--tasks", "2", "--batch", "2", "--pairs", "1", "--epochs", "1", "--seeds", "1", "--output", str(output)]
    assert bench_soft_sharing.main(flags) == 0
    found = json.loads(output.read_text())
    assert found["step"]["ratio"] > 0
    assert found["penalty"]["largest_relative_error_of_gradient"] < 1e-4
    run = found["collapse"]["runs"][0]
    assert abs(run["accuracy_after"] - run["accuracy_before"]) < 0.01  # all of the energy is kept
    assert set(run["spectra"]["start"]) == set(run["ranks"]) & set(run["spectra"]["start"])
