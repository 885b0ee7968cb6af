"""The whole command on small images: what it leaves, and one clear line for everything that is wrong."""

from pathlib import Path

import pytest
import torch

import compress
from scripts import cli, shrink
from scripts.factorize import main
from scripts.sources import build_model

NET = """
from torch import nn

def net(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 9, 40), nn.ReLU(), nn.Linear(40, num_classes),
    )
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "net.py"
    path.write_text(NET)
    return path


@pytest.fixture(scope="module")
def checkpoint(file: Path) -> Path:
    torch.manual_seed(0)
    path = file.with_name("dense.pt")
    torch.save(_build(file).state_dict(), path)
    return path


def _build(file: Path) -> torch.nn.Module:
    return build_model(f"{file}:net", num_classes=10)


def _flags(file: Path, checkpoint: Path, output: Path, *more: str) -> list[str]:
    base = {"--model": f"{file}:net", "--data": "digits", "--checkpoint": str(checkpoint), "--output": str(output)}
    base |= {"--budget.macs": "0.5", "--calibration-batches": "2"}
    return [part for pair in base.items() for part in pair] + list(more)


def test_leaves_a_file_that_loads_and_shows_what_was_lost(file: Path, checkpoint: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "small.safetensors"
    more = "--budget.macs 0.6 --methods svd spatial --protect 7 *5* --epochs 1 --calibration validation --recover false"
    assert main(_flags(file, checkpoint, output, *more.split())) == 0
    dense, small = _build(file), compress.load(_build(file), output)
    image = torch.zeros(1, 1, 8, 8)
    kept = compress.measure(small, image).macs / compress.measure(dense, image).macs
    assert 0.4 < kept <= 0.6
    assert type(small[7]) is type(small[5]) is torch.nn.Linear
    shown = capsys.readouterr().out
    for part in ("factorised layers", "dense", "after 1 epochs", "accuracy", "MACs", "latency", "it is protected"):
        assert part in shown


def test_retraining_learns_from_the_dense_model_and_without_epochs_nothing_is_trained(
    file: Path, checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    seen = []
    monkeypatch.setattr("scripts.factorize.fit", lambda *_, **options: seen.append(options))
    assert main(_flags(file, checkpoint, tmp_path / "a.safetensors", "--recover", "false")) == 0
    assert seen == []
    flags = ("--recover", "false", "--epochs", "2", "--distill", "0.7")
    assert main(_flags(file, checkpoint, tmp_path / "b.safetensors", *flags)) == 0
    (options,) = seen
    assert options["epochs"] == 2
    assert options["distillation"].weight == 0.7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "none.pt"], "none.pt does not exist"),
        (["--model", "layers:digits_cnn"], "does not fit the model"),
        (["--data", "mnist"], "none of digits, imagefolder"),
        (["--methods", "cp"], "'cp' is unknown"),
        (["--protect", "tail"], "protect='tail' matches no parameter"),
        (["--budget.macs", "0.001"], "brings macs down to"),
        (["--budget.macs", "1.5"], "above 0 and at most 1"),
        (["--budget.macs", "null", "--budget.channels", "0.5"], "not channels"),
        (["--budget.macs", "null"], "exactly one of"),
        (["--calibration", "test"], "--calibration is test"),
        (["--calibration-batches", "0"], "--calibration-batches is 0"),
        (["--epochs", "-1"], "--epochs is -1"),
        (["--distill", "2"], "--distill is 2"),
        (["--lr", "-1"], "lr is -1"),
        (["--device", "moon"], "--device moon"),
        (["--output", "small.pt"], "is a .safetensors"),
        (["--output", "no/such/small.safetensors"], "does not exist; create it"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    file: Path, checkpoint: Path, tmp_path: Path, flags: list[str], message: str, capfd
) -> None:
    assert main(_flags(file, checkpoint, tmp_path / "small.safetensors", *flags)) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_overwritten(file: Path, checkpoint: Path, tmp_path: Path, capfd) -> None:
    output = tmp_path / "small.safetensors"
    output.write_text("mine")
    assert main(_flags(file, checkpoint, output)) == 2
    assert "exists; choose another name" in capfd.readouterr().err
    assert output.read_text() == "mine"


def test_is_a_sub_command(file: Path, checkpoint: Path, tmp_path: Path, capsys) -> None:
    flags = _flags(file, checkpoint, tmp_path / "a.safetensors", "--methods", "cp")
    assert main(flags) == cli.main(["factorize", *flags]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == second


def test_shrink_spends_one_budget_on_channels_and_ranks(file: Path, checkpoint: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "both.safetensors"
    flags = _flags(file, checkpoint, output, "--budget.macs", "0.3", "--calibration-batches", "8", "--recover", "false")
    assert shrink.main(flags) == 0
    small, image = compress.load(_build(file), output), torch.zeros(1, 1, 8, 8)
    assert compress.measure(small, image).macs <= 0.3 * compress.measure(_build(file), image).macs
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("pruned", "shrunk", "accuracy", "latency"))
    wrong = [*_flags(file, checkpoint, tmp_path / "c.safetensors"), "--methods", "svd"]
    assert shrink.main(wrong) == cli.main(["shrink", *wrong]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("'svd' is unknown: choose among prune, factorize" in error for error in errors)
