import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks import bench_omniglot
from benchmarks.omniglot_networks import ARMS, STATISTICS, Arm, Network, Recipe, distort, train
from mtl.data import omniglot


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    for alphabet, characters in (("Greek", 2), ("Latin", 3)):
        for character in range(characters):
            folder = tmp_path / alphabet / f"character{character:02}"
            folder.mkdir(parents=True)
            for drawing in range(10):
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
    arms = ["single-task", "all + union"]
    assert bench_omniglot.main([*flags, "1", "--arms", *arms]) == 0
    first = json.loads(output.read_text())["rows"]
    assert len(first) == 2 * 2 * (2 + 1)  # two arms and kinds of statistics; two candidates, one seed
    assert json.loads(output.read_text())["missing"] == []
    assert bench_omniglot.main([*flags, "2", "--arms", *arms]) == 0
    document = json.loads(output.read_text())
    assert document["rows"][: len(first)] == first
    assert len(document["rows"]) == len(first) + 2 * 2
    lines = {line["arm"]: line for line in document["summary"]}
    assert set(lines) == set(arms)
    union = lines["all + union"]
    assert union["gain"] == pytest.approx(union["accuracy"] - lines["single-task"]["accuracy"])
    assert union["gain_low"] <= union["gain"] <= union["gain_high"]
    assert document["missing"] == []
    monkeypatch.setattr(bench_omniglot, "CANDIDATES", (Recipe(steps=1), Recipe(steps=3)))
    assert bench_omniglot.main([*flags, "1", "--arms", "single-task"]) == 0
    assert len(json.loads(output.read_text())["rows"]) > len(document["rows"])


@pytest.mark.parametrize("arm", ARMS)
def test_what_is_shared_is_what_the_arm_names(arm: str) -> None:
    network = Network({"a": 3, "b": 4}, ARMS[arm])
    shared = {name.rpartition("_")[0] for name, stack in network.stacks.items() if len(stack) == 1}
    assert shared == set(ARMS[arm].shared)
    assert (network.union is not None) == (ARMS[arm].union > 0)


@pytest.mark.parametrize("arm", ["single-task", "all", "convolutions", "first two"])
def test_the_grouped_computation_is_that_of_a_network_per_task(arm: str) -> None:
    network = Network({"a": 3, "b": 4}, ARMS[arm])
    with torch.no_grad():
        for stack in network.stacks.values():
            stack.add_(0.1 * torch.randn_like(stack))
    images = torch.rand(5, 2, 28, 28)

    def own(name: str, task: int) -> Tensor:
        stack = network.stacks[name]
        return stack[task] if len(stack) > 1 else stack[0]

    found = [images[:, task, None] for task in (0, 1)]
    for number in (1, 2, 3):
        found = [
            F.conv2d(x, own(f"conv{number}_weight", task), None, 2 if number == 1 else 1, 2 if number == 1 else 1)
            for task, x in enumerate(found)
        ]
        together = torch.cat(found) if f"norm{number}" in ARMS[arm].shared else None
        found = [
            (x - (x if together is None else together).mean((0, 2, 3), keepdim=True))
            / ((x if together is None else together).var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
            * own(f"norm{number}_weight", task)[:, None, None]
            + own(f"norm{number}_bias", task)[:, None, None]
            for task, x in enumerate(found)
        ]
        found = [x.relu() if number == 1 else F.max_pool2d(x.relu(), 2) for x in found]
    expected = torch.stack([x.flatten(1) for x in found])
    assert (network.features(images) - expected).norm() < 0.02 * expected.norm()  # bfloat16


def test_a_strong_coupling_keeps_the_networks_of_all_tasks_alike(drawings: Path) -> None:
    data = omniglot(drawings, train=2, validation=1)
    made: list[Network] = []
    build = Network.__init__

    def distance(sharing: float) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Network, "__init__", lambda self, *args: (build(self, *args), made.append(self))[0])
            accuracies = train(ARMS["L2 to the mean"], Recipe(steps=30, sharing=sharing), data, 0, "test")
        assert set(accuracies) == set(STATISTICS)
        assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())
        first, second = made.pop().stacks["conv2_weight"].detach()
        return float((first - second).norm())

    assert distance(10.0) < 0.5 * distance(0.0)


def test_copies_are_one_network_as_long_as_all_tasks_train_it(drawings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = omniglot(drawings, train=2, validation=1)
    made: list[Network] = []
    build = Network.__init__
    monkeypatch.setattr(Network, "__init__", lambda self, *args: (build(self, *args), made.append(self))[0])
    for together in (1.0, 0.5):
        train(Arm(union=1.0, together=together), Recipe(steps=4), data, 0, "test")
        alike = [torch.equal(stack[0], stack[1]) for stack in made.pop().stacks.values()]
        assert all(alike) if together == 1.0 else not any(alike)


def test_mixed_images_give_the_features_of_their_own_places() -> None:
    network = Network({"a": 3, "b": 4}, Arm(union=1.0, together=0.5)).eval()
    images = torch.rand(5, 2, 28, 28)
    found = network.mixed_features(images, torch.Generator().manual_seed(0))
    assert torch.allclose(found, network.features(images), atol=1e-2)  # bfloat16


def test_distortion_of_nothing_is_the_image() -> None:
    images = torch.rand(3, 1, 28, 28)
    generator = torch.Generator().manual_seed(0)
    assert torch.allclose(distort(images, 0.0, generator), images, atol=1e-5)
    assert (distort(images, 1.0, generator) - images).abs().mean() > 0.01
