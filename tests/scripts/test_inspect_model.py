"""The command prints tables, writes pictures, and says what is wrong with bad input in one line."""

from pathlib import Path

import pytest

from scripts.cli import main as prunus
from scripts.inspect_model import main

DIGITS = ("layers:digits_cnn", "--input-shape", "1", "1", "8", "8", "--num-classes", "7")


def test_prints_the_table_and_writes_both_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page, dot = tmp_path / "a.html", tmp_path / "a.dot"
    assert prunus(["inspect", *DIGITS, "--html", str(page), "--dot", str(dot)]) == 0
    output = capsys.readouterr().out
    for part in ("features.0.conv.weight", "never removed", "output of the model", "can be brought down to", str(page)):
        assert part in output
    assert "layers:digits_cnn" in page.read_text(encoding="utf-8")
    assert dot.read_text(encoding="utf-8").startswith("digraph")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.dot", "a.html"]


def test_the_model_is_first_or_a_flag(capsys: pytest.CaptureFixture) -> None:
    assert main(DIGITS) == 0
    positional = capsys.readouterr().out
    assert main(["--model", *DIGITS]) == 0
    assert capsys.readouterr().out == positional


def test_tokens_are_inputs_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "net.py"
    file.write_text("from torch import nn\ndef build(): return nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 4))\n")
    assert main([f"{file}:build", "--input-shape", "2", "5", "--input-dtype", "int64"]) == 0
    assert "0.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "these flags are required: --model, --input-shape"),
        (("layers:digits_cnn",), "these flags are required: --input-shape"),
        (("layers:digit_cnn", "--input-shape", "1"), "model 'layers:digit_cnn' does not exist; there is digits_cnn"),
        (("layers:digits_cnn", "--input-shape", "1", "0"), "--input-shape is [1, 0], but it takes sizes of at least 1"),
        (("layers:digits_cnn", "--input-shape", "wide"), "--input-shape cannot be 'wide'"),
        ((*DIGITS, "--input-dtype", "float"), "--input-dtype is float, but it must be one of float32"),
        ((*DIGITS[:-1], "0"), "--num-classes is 0, but it must be at least 1"),
        (("layers:digits_cnn", "--input-shape", "1", "3", "8", "8"), "in module features.0: "),
        ((*DIGITS, "--html", "none/a.html"), "none/a.html cannot be written: there is no folder none"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv: tuple, message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("prunus inspect: ")
    assert error.count("\n") == 1
