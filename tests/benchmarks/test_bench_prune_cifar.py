import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from benchmarks import bench_prune_cifar
from layers.models import digits_cnn

TINY = ["--model", "layers:digits_cnn", "--data", "digits", "--mean", "0.3", "--std", "0.4"]


def test_says_what_it_needs_and_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert bench_prune_cifar.main(["--output", str(output)]) == 0
    assert "skipped: bench_prune_cifar.py needs --checkpoint" in capsys.readouterr().err
    assert not output.exists()


def test_reports_every_round_and_no_path(tmp_path: Path) -> None:
    checkpoint, output = tmp_path / "dense.safetensors", tmp_path / "result.json"
    save_file(digits_cnn().state_dict(), checkpoint)
    flags = [*TINY, "--checkpoint", str(checkpoint), "--rounds", "1", "--epochs", "1", "--macs", "0.3"]
    flags += ["--folder", str(tmp_path / "run")]
    assert bench_prune_cifar.main([*flags, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert [row["round"] for row in result["rounds"]] == [0, 1]
    assert result["rounds"][0]["macs_kept"] == 1
    assert 0.25 < result["rounds"][1]["macs_kept"] <= 0.3
    history = json.loads((tmp_path / "run" / "history.json").read_text())["rounds"]
    assert [row["accuracy"] for row in result["rounds"]] == [record["accuracy"] for record in history]
    assert result["seconds"] > 0
    assert str(tmp_path) not in output.read_text()


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert bench_prune_cifar.main([*TINY, "--checkpoint", "none.pt", "--output", str(output)]) == 2
    assert "none.pt" in capsys.readouterr().err
    assert not output.exists()
