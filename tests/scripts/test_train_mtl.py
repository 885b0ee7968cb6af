import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from mtl import HardShared, restore
from mtl.data import ImageData, Split, cifar
from mtl.data.cifar import CIFAR10_TASKS
from scripts.cli import main
from scripts.task_sources import builders, open_tasks, tasks_of


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Rows of two features, a number and a class."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(60, 2)).round(3)
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "y", "sum", "side"])
        writer.writerows([[x, y, x + y, "left" if x < 0 else "right"] for x, y in rows])
    return tmp_path / "table.csv"


def flags(table: Path, folder: Path, *more: str) -> list[str]:
    return [
        "train-mtl", "--data", f"csv:{table}", "--targets", "sum", "side", "--epochs", "2", "--batch-size", "16",
        "--width", "8", "--device", "cpu", "--folder", str(folder), *more,
    ]  # fmt: skip


def test_methods_are_compared_resumed_and_restored(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    more = ("--methods", "single", "hard:uncertainty", "--seeds", "2", "--keep", "best")
    assert main(flags(table, folder, *more)) == 0
    shown = capsys.readouterr().out
    assert "delta m against 'single'" in shown
    found = json.loads((folder / "comparison.json").read_text())
    assert {method: len(row["side"]) for method, row in found["metrics"].items()} == {
        "single": 2,
        "hard:uncertainty": 2,
    }
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("fit.pt")}
    assert len(before) == 2 * (2 + 1)
    assert main(flags(table, folder, *more)) == 0
    assert json.loads((folder / "comparison.json").read_text()) == found
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("fit.pt")} == before

    data = open_tasks(f"csv:{table}", targets=["sum", "side"])
    trunk, head = builders(data, None, 8)
    model = HardShared(trunk(), {task.name: head(task) for task in tasks_of(data)})
    restore(model, folder / "hard-uncertainty" / "seed-1")

    assert main(flags(table, folder, *more, "--lr", "0.01")) == 2
    assert "holds another run: lr" in capsys.readouterr().err


def test_a_yaml_file_gives_the_flags(table: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: csv:{table}\ntargets: [sum, side]\nepochs: 1\nwidth: 4\ndevice: cpu\nmethods: [hard]\n"
        f"folder: {tmp_path / 'run'}\n"
    )
    assert main(["train-mtl", "--config", str(config)]) == 0
    assert (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing"], "data 'nothing' is none of digits"),
        (["--data", "digits:x"], "is none of"),
        (["--data", "digits", "--targets", "a"], "--targets, --features and --classes are for csv only"),
        (["--data", "csv:none.csv"], "csv needs --targets"),
        (["--data", "digits", "--methods", "harder"], "unknown method 'harder'"),
        (["--data", "digits", "--epochs", "0"], "--epochs is 0"),
        (["--data", "digits", "--trunk", "layers:nothing"], "does not exist"),
        (["--data", "school:none.mat"], "none.mat cannot be read as a MATLAB file"),
        (["--data", "omniglot:nowhere"], "nowhere holds no archives"),
        (["--data", "cifar10:nowhere"], "nowhere holds no folder cifar-10-batches-py"),
        (["--data", "cifar100:nowhere"], "nowhere holds no folder cifar-100-python"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train-mtl", *arguments, "--folder", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_of_images_for_each_task(tmp_path: Path) -> None:
    for task, classes in {"pets": ("cat", "dog"), "toys": ("ball", "car", "doll")}.items():
        for part, label in ((part, label) for part in ("train", "test") for label in classes):
            folder = tmp_path / task / part / label
            folder.mkdir(parents=True)
            for index in range(12):
                pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    data = open_tasks(f"imagefolder:{tmp_path}")
    assert [task.name for task in tasks_of(data)] == ["pets", "toys"]
    trunk, head = builders(data, None, 16)
    model = HardShared(trunk(), {task.name: head(task) for task in tasks_of(data)}).eval()
    assert model(torch.randn(2, 3, 8, 8))["toys"].shape == (2, 3)
    with pytest.raises(ValueError, match="holds no folders"):
        open_tasks(f"imagefolder:{tmp_path / 'nothing'}")


def test_the_digits_are_six_tasks_of_two_kinds() -> None:
    data = open_tasks("digits")
    tasks = tasks_of(data)
    assert len(tasks) == 6
    assert {task.name for task in tasks if task.direction == "min"} == {"ink"}
    trunk, head = builders(data, "layers:digits_cnn", 10)
    model = HardShared(trunk(), {task.name: head(task) for task in tasks}).eval()
    assert model(torch.randn(2, 1, 8, 8))["digit"].shape == (2, 10)


def school(folder: Path) -> str:
    random = np.random.default_rng(0)
    cells = np.empty((2, 1, 9), object)
    for index in range(9):
        cells[0, 0, index] = random.normal(size=(24, 3))
        cells[1, 0, index] = cells[0, 0, index].sum(1) + index
    savemat(folder / "school.mat", {"X": cells[0], "Y": cells[1]})
    return f"school:{folder / 'school.mat'}"


def omniglot(folder: Path) -> str:
    for alphabet, characters in (("Greek", 2), ("Latin", 3)):
        for character in range(characters):
            place = folder / "omniglot" / alphabet / f"character{character:02}"
            place.mkdir(parents=True)
            for drawing in range(7):
                pixels = np.random.default_rng(10 * character + drawing).integers(0, 256, (28, 28), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{alphabet}{character:04}_{drawing:02}.png")
    return f"omniglot:{folder / 'omniglot'}"


def cifar10(folder: Path) -> str:
    for part, name in (
        (part, name) for part in ("train", "test") for names in CIFAR10_TASKS.values() for name in names
    ):
        place = folder / "cifar10" / part / name
        place.mkdir(parents=True)
        for index in range(10 if part == "train" else 2):
            pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{index}.png")
    return f"cifar10:{folder / 'cifar10'}"


@pytest.mark.parametrize(
    ("source", "tasks", "methods"),
    [
        (school, [f"school{index}" for index in range(9)], ["single", "soft:l2"]),
        (omniglot, ["Greek", "Latin"], ["single", "private norms"]),
        (cifar10, ["mammals", "others", "vehicles"], ["hard"]),
    ],
)
def test_every_source_is_trained_to_a_table(
    source: Callable[[Path], str],
    tasks: list[str],
    methods: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    options = ["--shots", "2"] if source is omniglot else []
    arguments = [
        "--data",
        source(tmp_path),
        "--epochs",
        "1",
        "--width",
        "8",
        "--device",
        "cpu",
        "--folder",
        str(folder),
    ]
    assert main(["train-mtl", *arguments, *options, "--methods", *methods]) == 0
    shown = capsys.readouterr().out
    found = json.loads((folder / "comparison.json").read_text())
    assert list(found["metrics"]) == methods
    for row in found["metrics"].values():
        assert sorted(row) == tasks
        assert all(math.isfinite(value) for values in row.values() for value in values)
    assert all(task in shown for task in tasks)
    assert "one seed" in shown


def test_the_super_classes_of_cifar100_are_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(sorted(name for group in cifar.SUPER_CLASSES.values() for name in group))
    images = torch.randint(256, (200, 3, 8, 8), dtype=torch.uint8)
    split = Split(images, torch.arange(100).repeat(2))
    monkeypatch.setattr(
        cifar, "cifar100", lambda *_, **__: ImageData(split, None, split, names, (0.5,) * 3, (0.2,) * 3)
    )
    arguments = ["--data", "cifar100:anywhere", "--methods", "hard", "--epochs", "1", "--width", "8", "--device", "cpu"]
    assert main(["train-mtl", *arguments, "--folder", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert sorted(found["metrics"]["hard"]) == sorted(cifar.SUPER_CLASSES)
