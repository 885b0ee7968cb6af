import json
from pathlib import Path

import pytest

from benchmarks import bench_recurrent


def test_compares_all_layers_and_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench_recurrent.json"
    flags = ["--batch", "3", "--steps", "6", "--input-size", "4", "--hidden-size", "5", "--repeats", "1"]
    assert bench_recurrent.main([*flags, "--output", str(output)]) == 0
    results = json.loads(output.read_text())["results"]
    assert [result["layer"] for result in results] == ["RNN", "LSTM", "GRU"]
    for result in results:
        assert result["largest_difference"] < 1e-5
        assert min(seconds for stages in result["median_seconds"].values() for seconds in stages.values()) > 0
    assert "GRU" in capsys.readouterr().out
