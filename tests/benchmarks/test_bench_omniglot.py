import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import bench_omniglot
from benchmarks.bench_omniglot import ARMS, Network, Recipe, distort


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    for alphabet, characters in (("Greek", 2), ("Latin", 3)):
        for character in range(characters):
            folder = tmp_path / alphabet / f"character{character:02}"
            folder.mkdir(parents=True)
            for drawing in range(6):
                image = Image.new("L", (28, 28), 255)
                image.paste(0, (4 + 3 * character, 5, 8 + 3 * character, 20 + drawing % 3))
                image.save(folder / f"{alphabet}{character:04}_{drawing:02}.png")
    return tmp_path


def test_says_what_it_needs_and_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert bench_omniglot.main(["--output", str(output)]) == 0
    assert "skipped: bench_omniglot.py needs --data" in capsys.readouterr().err
    assert bench_omniglot.main(["--data", str(tmp_path), "--output", str(output)]) == 2
    assert not output.exists()


def test_every_arm_is_tuned_and_compared_and_goes_on_where_it_stopped(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_omniglot, "CANDIDATES", (Recipe(steps=1), Recipe(steps=2)))
    output = tmp_path / "result.json"
    flags = ["--data", str(drawings), "--drawings", "1", "--output", str(output), "--seeds"]
    arms = ["single-task", "convolutions + union"]
    assert bench_omniglot.main([*flags, "1", "--arms", *arms]) == 0
    first = json.loads(output.read_text())["rows"]
    assert len(first) == 2 * (2 + 1)  # two candidates, one seed
    assert bench_omniglot.main([*flags, "2", "--arms", *arms]) == 0
    document = json.loads(output.read_text())
    assert document["rows"][: len(first)] == first
    assert len(document["rows"]) == len(first) + 2
    lines = {line["arm"]: line for line in document["summary"]}
    assert set(lines) == set(arms)
    union = lines["convolutions + union"]
    assert union["gain"] == pytest.approx(union["accuracy"] - lines["single-task"]["accuracy"])
    assert union["gain_low"] <= union["gain"] <= union["gain_high"]


@pytest.mark.parametrize("arm", ARMS)
def test_what_is_shared_is_what_the_arm_names(arm: str) -> None:
    network = Network({"a": 3, "b": 4}, ARMS[arm])
    assert {name for name, copies in network.stages.items() if len(copies) == 1} == set(ARMS[arm].shared)
    assert (network.union is not None) == (ARMS[arm].union > 0)
    features = network.eval().features([torch.rand(2, 1, 28, 28), torch.rand(5, 1, 28, 28)])
    assert [len(part) for part in features] == [2, 5]


def test_private_modules_see_the_images_of_their_task_only() -> None:
    network = Network({"a": 3, "b": 4}, ARMS["single-task"])
    left, right = torch.rand(2, 4, 1, 28, 28)
    before, _ = network.features([left, right])
    after, _ = network.features([left, right * 3])
    assert torch.equal(before, after)
    shared = Network({"a": 3, "b": 4}, ARMS["all"])
    assert not torch.equal(shared.features([left, right])[0], shared.features([left, right * 3])[0])


def test_distortion_of_nothing_is_the_image() -> None:
    images = torch.rand(3, 1, 28, 28)
    generator = torch.Generator().manual_seed(0)
    assert torch.allclose(distort(images, 0.0, generator), images, atol=1e-5)
    assert (distort(images, 1.0, generator) - images).abs().mean() > 0.01
