import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from benchmarks import bench_no_training
from layers.models import digits_cnn

TINY = ["--data", "digits", "--mean", "0.3", "--std", "0.4", "--images", "640", "--batch-size", "128"]


def test_says_what_it_needs_and_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert bench_no_training.main(["--output", str(output)]) == 0
    assert "skipped: bench_no_training.py needs --checkpoint" in capsys.readouterr().err
    assert not output.exists()


def test_every_way_of_pruning_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_no_training, "_torch_pruning", _missing)  # the peer need not be installed
    weights, output = tmp_path / "dense.safetensors", tmp_path / "result.json"
    save_file(digits_cnn().state_dict(), weights)
    flags = [*TINY, "--checkpoint", f"layers:digits_cnn={weights}@0.6", "--criterion", "l1", "reconstruction"]
    assert bench_no_training.main([*flags, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    ours = [row for row in rows if "failed" not in row]
    names = ["dense", "l1, nothing else", "l1, recovered", "reconstruction, recovered"]
    assert [row["method"] for row in ours] == names
    assert all(0.5 < row["macs_kept"] <= 0.6 and 0 <= row["accuracy"] <= 1 for row in ours[1:])
    assert len(rows) - len(ours) == 3
    assert str(tmp_path) not in output.read_text()


def _missing(*_: object) -> None:
    raise ModuleNotFoundError("No module named 'torch_pruning'")


@pytest.mark.parametrize("checkpoint", ["layers:digits_cnn", "layers:digits_cnn=none.pt@0.5"])
def test_bad_input_is_one_line_and_nothing_is_written(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    assert bench_no_training.main([*TINY, "--checkpoint", checkpoint, "--output", str(output)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not output.exists()
