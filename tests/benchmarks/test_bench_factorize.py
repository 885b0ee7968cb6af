import json
from pathlib import Path

import pytest
from torch import nn

from benchmarks import bench_factorize

TINY = ["--data", "digits", "--mean", "0.3", "--std", "0.4", "--images", "640", "--batch-size", "128"]


def test_says_what_it_needs_and_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert bench_factorize.main(["--output", str(output)]) == 0
    assert "skipped: bench_factorize.py needs --checkpoint" in capsys.readouterr().err
    assert not output.exists()


def test_every_way_of_factorising_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    monkeypatch.setattr(bench_factorize, "trained_model", lambda *_: net.eval())
    output = tmp_path / "result.json"
    flags = [*TINY, "--checkpoint", "layers:net=file@0.6", "--methods", "all", "spatial"]
    assert bench_factorize.main([*flags, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    names = ["dense", "all, nothing else", "all, recovered", "spatial, nothing else", "spatial, recovered"]
    assert [row["method"] for row in rows] == names
    assert all(0.5 < row["macs_kept"] <= 0.6 and 0 <= row["accuracy"] <= 1 for row in rows[1:])


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert bench_factorize.main([*TINY, "--checkpoint", "layers:digits_cnn", "--output", str(output)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not output.exists()
