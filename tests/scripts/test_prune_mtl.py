"""The whole command on a small table: every task in its tables, what it saves, and one line for what is wrong."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import compress
from mtl import SoftShared
from mtl.comparison import standard_method
from scripts.cli import main
from scripts.task_sources import builders, open_tasks, tasks_of


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two features, a number and a class."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(60, 2)).round(3)
    path = tmp_path_factory.mktemp("data") / "table.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "y", "sum", "side"])
        writer.writerows([[x, y, x + y, "left" if x < 0 else "right"] for x, y in rows])
    return path


def flags(table: Path, folder: Path, *more: str) -> list[str]:
    return [
        "prune-mtl", "--data", f"csv:{table}", "--targets", "sum", "side", "--budget.macs", "0.5", "--width", "8",
        "--dense-epochs", "2", "--epochs", "1", "--batch-size", "16", "--device", "cpu", "--folder", str(folder), *more,
    ]  # fmt: skip


def test_prunes_tasks_that_share_a_trunk_and_goes_on(table: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    assert main(flags(table, folder, "--rounds", "2", "--max-drop", "5")) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("dense model", "round 2 of 2", "mean of tasks", "sum", "side", "MACs"))
    rounds = json.loads((folder / "history.json").read_text())["rounds"]
    assert rounds[-1]["macs"] <= 0.5 * rounds[0]["macs"]
    assert {"sum", "side"} == set(rounds[-1]["metrics"])
    assert rounds[-1]["accuracy"] == pytest.approx(sum(rounds[-1]["metrics"].values()) / 2)
    with (folder / "history.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert float(lines[-1]["accuracy/side"]) == rounds[-1]["metrics"]["side"]
    data = open_tasks(f"csv:{table}", targets=["sum", "side"])
    fresh = standard_method("hard", *builders(data, None, 8)).build(tasks_of(data))
    small = compress.load(fresh, folder / "small.safetensors")
    assert compress.measure(small, torch.zeros(1, 2)).macs == rounds[-1]["macs"]
    assert main(flags(table, folder, "--rounds", "2", "--max-drop", "5")) == 0  # the same again, from the disk
    assert json.loads((folder / "history.json").read_text())["rounds"] == rounds


def test_a_soft_shared_model_is_collapsed_and_pruned_and_loads_into_a_fresh_one(table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ("--method", "soft:l2:0.1", "--collapse", "0.9", "--criterion", "mean_activation", "--combine", "max")
    assert main(flags(table, folder, *more, "--epochs", "0")) == 0
    data = open_tasks(f"csv:{table}", targets=["sum", "side"])
    trunk, head = builders(data, None, 8)
    fresh = SoftShared(lambda task: torch.nn.Sequential(trunk(), head(task)), tasks_of(data))
    small = compress.load(fresh, folder / "small.safetensors")
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in fresh.parameters())
    assert {task: tuple(output.shape) for task, output in small(torch.zeros(3, 2)).items()} == {
        "sum": (3, 1),
        "side": (3, 2),
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nothing"], "data 'nothing' is none of digits"),
        (["--method", "harder"], "unknown method 'harder'"),
        (["--method", "single"], "which shares nothing"),
        (["--collapse", "0.9"], "--collapse is for soft sharing"),
        (["--method", "soft:l2", "--collapse", "2"], "energy is 2"),
        (["--combine", "best"], "--combine cannot be 'best'"),
        (["--criterion", "no_such"], "no_such"),
        (["--budget.macs", "0.0001"], "cannot be reached"),
        (["--epochs", "-1"], "--epochs is -1"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--checkpoint", "none.pt"], "does not exist"),
        (["--lr", "-1"], "lr is -1"),
        (["--max-drop", "-1"], "max_drop is -1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    table: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(table, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
