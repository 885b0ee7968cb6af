import json
from pathlib import Path

import pytest

import compress.attempt
from benchmarks import bench_latency


def test_measures_again_what_was_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress.attempt, "relative_latency", lambda *_: 0.59)  # no second of measuring
    output = tmp_path / "result.json"
    flags = ["--models", "layers:resnet20_cifar", "--batches", "1", "--pairs", "2", "--output", str(output)]
    assert bench_latency.main(flags) == 0
    found = json.loads(output.read_text())["results"]
    assert [row["budget"] for row in found] == ["latency=0.6", "macs=0.6, auto", "macs=0.6"]
    assert [row["met"] is None for row in found] == [False, True, True]
    assert all(row["ratio"] > 0 for row in found)
    assert all(row["macs_kept"] <= 0.6 for row in found[1:])
