import json
from pathlib import Path

import pytest

from benchmarks import bench_trace


def test_times_every_stage_and_writes_what_it_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench_trace.json"
    flags = ["--models", "layers:digits_cnn", "--image-size", "8", "--repeats", "1", "--no-peers"]
    assert bench_trace.main([*flags, "--output", str(output)]) == 0
    (result,) = json.loads(output.read_text())["results"]
    seconds = result["median_seconds"]["prunus"]
    stages = [seconds[name] for name in ("trace", "plan", "apply", "verify", "count")]
    assert min(stages) > 0
    assert sum(stages) == pytest.approx(seconds["total"])
    assert 0.3 < result["macs_kept"]["prunus"] <= 0.5
    assert "layers:digits_cnn" in capsys.readouterr().out
