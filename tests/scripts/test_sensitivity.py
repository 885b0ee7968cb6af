"""The command on digits: its tables and files, that it resumes, and one line for what is wrong."""

import csv
from pathlib import Path

import pytest
import torch

from layers.models import digits_cnn
from scripts import cli
from scripts.sensitivity import main


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    torch.save(digits_cnn().state_dict(), tmp_path / "dense.pt")
    return ["--model", "layers:digits_cnn", "--data", "digits", "--checkpoint", str(tmp_path / "dense.pt"),
            "--ratios", "0.5", "0.25", "--images", "40", "--folder", str(tmp_path / "run")]  # fmt: skip


def test_tables_and_files(flags: list[str], tmp_path: Path, capsys) -> None:
    assert cli.main(["sensitivity", *flags, "--criteria", "l2", "taylor"]) == 0
    output = capsys.readouterr().out
    for part in ("l2: accuracy", "taylor: accuracy", "dense:", "50%", "25%", "sensitivity.csv", "tensorboard"):
        assert part in output
    with (tmp_path / "run" / "sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["criterion"] for row in rows} == {"", "l2", "taylor"}
    assert all(round(40 * float(row["accuracy"]), 6).is_integer() for row in rows), "40 images"
    stamp = (tmp_path / "run" / "points.jsonl").stat().st_mtime_ns
    assert main([*flags, "--criteria", "l2", "taylor"]) == 0
    assert capsys.readouterr().out == output
    assert (tmp_path / "run" / "points.jsonl").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ratios", "1.5"], "above 0 and below 1"),
        (["--criteria", "l3"], "criterion 'l3' is none of"),
        (["--images", "0"], "--images is 0"),
        (["--checkpoint", "none.pt"], "does not exist"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags: list[str], more: list[str], message: str, tmp_path, capsys) -> None:
    assert main([*flags, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
