import csv
import json
from pathlib import Path

import pytest
from torch import nn

from benchmarks import bench_shrink

TINY = ["--data", "digits", "--mean", "0.3", "--std", "0.4", "--images", "640", "--batch-size", "128"]


def test_says_what_it_needs_and_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert bench_shrink.main(["--output", str(output)]) == 0
    assert "skipped: bench_shrink.py needs --checkpoint" in capsys.readouterr().err
    assert not output.exists()


def test_every_method_is_a_row_of_the_table_and_a_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )
    monkeypatch.setattr(bench_shrink, "trained_model", lambda *_: net.eval())
    output = tmp_path / "result.json"
    flags = [*TINY, "--checkpoint", "layers:net=file@0.6,0.0001", "--output", str(output)]
    assert bench_shrink.main([*flags, "--methods", "prune", "factorize"]) == 0
    first = json.loads(output.read_text())["rows"]
    assert bench_shrink.main([*flags, "--methods", "shrink"]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert rows[:5] == first  # what is there is not measured again
    assert bench_shrink.main([*flags, "--images", "512"]) == 2
    rows = json.loads(output.read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", *["prune", "factorize"] * 2, "shrink", "shrink"]
    reached = [row for row in rows if row.get("budget") == 0.6]
    assert all(0.5 < row["macs_kept"] <= 0.6 and row["latency"] > 0 for row in reached)
    assert all(("failed" in row) == (row["budget"] == 0.0001) for row in rows[1:])  # that is out of reach
    with output.with_suffix(".csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == [row["method"] for row in rows]
    assert float(table[1]["accuracy"]) == rows[1]["accuracy"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert bench_shrink.main([*TINY, "--checkpoint", "layers:digits_cnn", "--output", str(output)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not output.exists()
