"""The whole command on small images: what it leaves, that it resumes, one clear line for everything that is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import compress
from scripts import cli
from scripts.prune import main
from scripts.sources import build_model

NET = """
from torch import nn

def net(num_classes, width=12):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * width, num_classes),
    )

def wider(num_classes):
    return net(num_classes, width=13)
"""
RESULTS = ("small.safetensors", "history.json", "history.csv", "curve.png", "config.yaml")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "net.py"
    path.write_text(NET)
    return path


@pytest.fixture(scope="module")
def checkpoint(file: Path) -> Path:
    torch.manual_seed(0)
    path = file.with_name("dense.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in _build(file).state_dict().items()}}, path)
    return path


def _build(file: Path) -> torch.nn.Module:
    return build_model(f"{file}:net", num_classes=10)


def _flags(file: Path, folder: Path, *more: str) -> list[str]:
    base = {"--model": f"{file}:net", "--data": "digits", "--budget.macs": "0.5", "--folder": str(folder)}
    base |= {"--rounds": "2", "--epochs": "1", "--dense-epochs": "3"}
    return [part for pair in base.items() for part in pair] + list(more)


def _history(folder: Path) -> list[dict]:
    rounds = json.loads((folder / "history.json").read_text())["rounds"]
    return [{key: value for key, value in entry.items() if key != "latency_seconds"} for entry in rounds]


@pytest.fixture(scope="module")
def finished(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert main(_flags(file, folder)) == 0
    return folder


def test_leaves_its_results(finished: Path, file: Path) -> None:
    assert all((finished / name).stat().st_size > 0 for name in RESULTS)
    rounds = _history(finished)
    assert [entry["round"] for entry in rounds] == [0, 1, 2]
    assert rounds[2]["macs"] <= 0.5 * rounds[0]["macs"]
    assert rounds[0]["accuracy"] > 0.5  # the dense model was trained
    small = compress.load(_build(file), finished / "small.safetensors")
    assert compress.measure(small, torch.zeros(1, 1, 8, 8)).macs == rounds[2]["macs"]


def test_shows_every_round_and_before_and_after_when_it_comes_back(finished: Path, file: Path, capsys) -> None:
    before = _history(finished)
    assert main(_flags(file, finished)) == 0
    output = capsys.readouterr().out
    for part in (
        "dense model",
        "round 1 of 2",
        "round 2 of 2",
        "before / after",
        "latency",
        "kept per layer",
        "tensorboard",
    ):
        assert part in output
    assert _history(finished) == before


def test_the_config_reproduces_the_run(finished: Path, tmp_path: Path) -> None:
    assert yaml.safe_load((finished / "config.yaml").read_text())["budget"]["macs"] == 0.5
    assert main(["--config", str(finished / "config.yaml"), "--folder", str(tmp_path / "b")]) == 0
    assert _history(tmp_path / "b") == _history(finished)


def test_another_run_is_refused_and_nothing_is_overwritten(finished: Path, file: Path, capsys) -> None:
    content = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(_flags(file, finished, "--epochs", "2")) == 2
    error = capsys.readouterr().err
    assert "epochs is 1 there and 2 here" in error
    assert error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == content


@pytest.mark.parametrize("criterion", ["bn_scale", "nonzero", "taylor"])
def test_prunes_a_checkpoint_by_every_criterion(file: Path, checkpoint: Path, tmp_path: Path, criterion: str) -> None:
    flags = _flags(file, tmp_path / "a", "--checkpoint", str(checkpoint), "--criterion", criterion, "--rounds", "1")
    assert main([*flags, "--mean", "0.3", "--std", "0.4", "--batch-size", "500"]) == 0
    assert not (tmp_path / "a" / "dense").exists()
    assert _history(tmp_path / "a")[1]["macs"] <= 0.5 * _history(tmp_path / "a")[0]["macs"]


def test_calibration_is_on_the_images_that_were_asked_for(
    file: Path, checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    seen = []

    def loader(data, split, **options):
        seen.append((split, options.get("batch_size"), options.get("limit"), len(getattr(data, split))))
        raise ValueError("enough")

    for criterion in ("nonzero", "taylor"):
        (tmp_path / f"{criterion}.py").write_text(f"from compress import CRITERIA\nfound = CRITERIA['{criterion}']\n")
    monkeypatch.setattr("scripts.prune.model_and_example", lambda config, data: (None, None))
    monkeypatch.setattr("mtl.data.ImageData.loader", loader)
    flags = _flags(file, tmp_path / "a", "--checkpoint", str(checkpoint))
    for more in (
        ["--criterion", "nonzero"],
        ["--criterion", "nonzero", "--calibration", "train", "--calibration-batches", "3"],
        ["--criterion", f"{tmp_path / 'taylor.py'}:found", "--calibration-batches", "2"],
        ["--recover"],
        ["--recover", "--calibration", "validation"],
        ["--recover", "--validation", "0"],
        ["--criterion", "nonzero", "--validation", "0"],
    ):
        assert main([*flags, *more]) == 2
    whole, held_out = 1437, 144
    assert seen == [
        ("validation", 128, 8 * 128, held_out),
        ("train", 128, 3 * 128, whole - held_out),
        ("validation", 32, 2 * 32, held_out),
        ("train", 128, 8 * 128, whole - held_out),
        ("validation", 128, 8 * 128, held_out),
        ("train", 128, 8 * 128, whole),
        ("train", 128, 8 * 128, whole),
    ]


def test_validation_decides_and_the_test_images_are_only_reported(
    file: Path, checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    """The images of each part get an accuracy of their own: what is in which place tells which were looked at."""
    values = {144: iter([0.9, 0.85, 0.6]), 360: iter([0.9, 0.1, 0.95])}

    def accuracy(model, task, loader):
        return {"class": next(values[sum(len(labels) for _, labels in loader)])}

    monkeypatch.setattr("scripts.prune.evaluate", accuracy)
    monkeypatch.setattr("scripts.prune.fit", lambda *_, **__: None)
    assert main(_flags(file, tmp_path / "a", "--checkpoint", str(checkpoint), "--max-drop", "0.2")) == 0
    rounds = _history(tmp_path / "a")
    assert [(entry["accuracy"], entry["test"]) for entry in rounds] == [(0.9, 0.9), (0.85, 0.1), (0.6, 0.95)]
    small = compress.load(_build(file), tmp_path / "a" / "small.safetensors")
    assert compress.measure(small, torch.zeros(1, 1, 8, 8)).macs == rounds[1]["macs"]


def test_without_validation_images_all_of_the_training_images_are_trained_on(
    file: Path, checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    trained, tested = [], []
    monkeypatch.setattr("scripts.prune.fit", lambda model, task, loader, **_: trained.append(len(loader)))
    monkeypatch.setattr("scripts.prune.evaluate", lambda model, task, loader: tested.append(1) or {"class": 0.5})
    flags = _flags(file, tmp_path / "a", "--checkpoint", str(checkpoint), "--validation", "0", "--batch-size", "1")
    assert main(flags) == 0
    assert trained == [1437, 1437]
    assert len(tested) == 3, "once a round"
    assert _history(tmp_path / "a")[0]["test"] is None


def test_sparsity_presses_in_every_round_before_a_removal(
    file: Path, checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    penalties = []
    monkeypatch.setattr("scripts.prune.fit", lambda *_, penalty, **__: penalties.append(penalty))
    flags = _flags(file, tmp_path / "a", "--checkpoint", str(checkpoint), "--sparsity", "1e-4", "--schedule", "linear")
    assert main(flags) == 0
    assert [penalty and penalty.strength for penalty in penalties] == [1e-4, 1e-4, None]
    macs = [entry["macs"] for entry in _history(tmp_path / "a")]
    assert macs[0] == macs[1] > macs[2] > macs[3]


def _write_payload(path: Path) -> None:
    torch.save({"state_dict": {}, "extra": os.system}, path)


def _folder_of_images(path: Path, size: int, number: int) -> str:
    for part in ("train", "test"):
        for name in ("a", "b"):
            (path / part / name).mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", (size, size), (index, 0, 0)).save(path / part / name / f"{index}.png")
    return f"imagefolder:{path}"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing checkpoint", "does not exist"),
        ("corrupt checkpoint", "damaged or no checkpoint"),
        ("payload", "refused"),
        ("wrong architecture", "does not fit the model Sequential"),
        ("wrong image size", "cannot run on the images (3, 16, 16)"),
        ("empty data", "holds no images"),
        ("no data", "none of digits, imagefolder"),
        ("criterion", "no_such"),
        ("criterion file", "no_such.py does not exist"),
        ("calibration", "--calibration is test, but it must be validation or train"),
        ("calibration batches", "--calibration-batches is 0"),
        ("budget of 0", "above 0 and at most 1"),
        ("budget of 1.5", "above 0 and at most 1"),
        ("two budgets", "one of"),
        ("no budget", "one of"),
        ("unreachable budget", "cannot be reached"),
        ("rounds", "--rounds is 0"),
        ("device", "--device moon"),
        ("max drop", "max_drop is -1"),
        ("validation", "--validation is -1"),
        ("no validation to stop by", "--max-drop needs validation images"),
        ("no validation to calibrate on", "there is no validation split"),
        ("sparsity", "--sparsity is -1"),
        ("average", "ema_decay is 1"),
        ("learning rate", "lr is -1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(file: Path, tmp_path: Path, case: str, message: str, capfd) -> None:
    path, folder = tmp_path / "a.pt", tmp_path / "run"
    more: dict[str, list[str]] = {
        "missing checkpoint": ["--checkpoint", str(path)],
        "corrupt checkpoint": ["--checkpoint", str(path)],
        "payload": ["--checkpoint", str(path)],
        "wrong architecture": ["--checkpoint", str(path), "--model", f"{file}:wider"],
        "wrong image size": ["--data", _folder_of_images(tmp_path / "x", size=16, number=12)],
        "empty data": ["--data", _folder_of_images(tmp_path / "y", size=16, number=0)],
        "no data": ["--data", "mnist"],
        "criterion": ["--criterion", "no_such"],
        "criterion file": ["--criterion", "no_such.py:function"],
        "calibration": ["--calibration", "test"],
        "calibration batches": ["--calibration-batches", "0"],
        "budget of 0": ["--budget.macs", "0"],
        "budget of 1.5": ["--budget.macs", "1.5"],
        "two budgets": ["--budget.params", "0.5"],
        "no budget": ["--budget.macs", "null"],
        "unreachable budget": ["--budget.macs", "0.001"],
        "rounds": ["--rounds", "0"],
        "device": ["--device", "moon"],
        "max drop": ["--max-drop", "-1"],
        "validation": ["--validation", "-1"],
        "no validation to stop by": ["--max-drop", "0.1", "--validation", "0"],
        "no validation to calibrate on": ["--recover", "--calibration", "validation", "--validation", "0"],
        "sparsity": ["--sparsity", "-1"],
        "average": ["--ema-decay", "1"],
        "learning rate": ["--lr", "-1"],
    }
    if case == "corrupt checkpoint":
        path.write_bytes(b"no checkpoint at all")
    elif case == "payload":
        _write_payload(path)
    elif case == "wrong architecture":
        torch.save(_build(file).state_dict(), path)
    assert main(_flags(file, folder, *more[case])) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not folder.exists()


def test_as_a_script_and_as_a_command(file: Path, tmp_path: Path, capsys) -> None:
    script = Path(__file__).parents[2] / "scripts" / "prune.py"
    flags = _flags(file, tmp_path / "a", "--criterion", "no_such")
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2
    assert cli.main(["prune", *flags]) == 2
    assert done.stderr == capsys.readouterr().err


def test_the_command_lists_its_sub_commands(capsys) -> None:
    assert cli.main([]) == cli.main(["--help"]) == 0
    assert "prune" in capsys.readouterr().out
    assert cli.main(["prone"]) == 2
    assert f"choose one of {', '.join(cli.COMMANDS)}" in capsys.readouterr().err
