"""The demo keeps its promise, and can be run again."""

import json
from pathlib import Path

import pytest
import torch

from scripts.demo import main


@pytest.mark.slow
def test_a_quarter_of_the_macs_within_a_point_of_the_dense_accuracy(tmp_path: Path, capsys) -> None:
    threads = torch.get_num_threads()
    try:
        assert main(["--folder", str(tmp_path / "demo")]) == 0
        rounds = json.loads((tmp_path / "demo" / "history.json").read_text())["rounds"]
        assert rounds[-1]["macs"] <= 0.25 * rounds[0]["macs"]
        assert rounds[-1]["accuracy"] >= max(0.97, rounds[0]["accuracy"] - 0.01)
        output = capsys.readouterr().out
        assert "the same outputs" in output
        assert "shrink (both)" in output

        assert main(["--folder", str(tmp_path / "demo")]) == 0
        output = capsys.readouterr().out
        assert "is complete" in output
        assert "before / after" in output
    finally:
        torch.set_num_threads(threads)


def test_fresh_deletes_nothing_but_a_run(tmp_path: Path, capsys) -> None:
    (tmp_path / "history.json").write_text("mine")
    assert main(["--folder", str(tmp_path), "--fresh"]) == 2
    assert "history.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]
