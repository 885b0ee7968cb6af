"""The benchmark of fit's default step runs, and its two loops learn."""

import json
from pathlib import Path

from benchmarks import bench_fit


def test_it_writes_ratios(tmp_path: Path) -> None:
    file = tmp_path / "bench_fit.json"
    arguments = ["--output", str(file), "--batch-size", "4", "--steps", "1", "--repeats", "1"]
    assert bench_fit.main(arguments) == 0
    found = json.loads(file.read_text())
    assert found["times_as_fast_as_eager"]["eager"] == 1
    assert set(found["seconds_per_step"]) == {"eager", "channels-last", "bf16, channels-last", "fit"}
