import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import bench_prune_mtl


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """Two alphabets of lines at different places, 10 drawings of each character."""
    for alphabet, characters in (("Greek", 2), ("Latin", 3)):
        for character in range(characters):
            folder = tmp_path / "data" / alphabet / f"character{character:02}"
            folder.mkdir(parents=True)
            for drawing in range(10):
                image = Image.new("L", (28, 28), 255)
                image.paste(0, (4 + 3 * character, 5, 8 + 3 * character, 18 + drawing % 5))
                image.save(folder / f"{alphabet}{character:04}_{drawing:02}.png")
    return tmp_path / "data"


def test_says_what_it_needs_and_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert bench_prune_mtl.main(["--parts", "balanced", "--output", str(output)]) == 0
    assert "skipped: bench_prune_mtl.py needs --data" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.filterwarnings("ignore:too few calibration samples")
def test_every_arm_prunes_the_same_model(drawings: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    flags = ["--parts", "balanced", "--data", str(drawings), "--epochs", "1", "--seeds", "1", "--macs", "0.5"]
    assert bench_prune_mtl.main([*flags, "--output", str(output)]) == 0
    found = json.loads(output.read_text())["balanced"]
    assert {run["arm"] for run in found["runs"]} == set(bench_prune_mtl.ARMS)
    assert all(run["macs_kept"] <= 0.5 for run in found["runs"])
    assert all(run["dense"] == found["runs"][0]["dense"] for run in found["runs"])
    assert [set(run["task_losses"]) for run in found["runs"]] == [set(), {"Greek", "Latin"}, {"Greek", "Latin"}]


@pytest.mark.slow
def test_a_stack_is_collapsed_and_pruned(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    flags = ["--parts", "stack", "--seeds", "1", "--stack-epochs", "1"]
    assert bench_prune_mtl.main([*flags, "--output", str(output)]) == 0
    found = json.loads(output.read_text())["stack"]
    assert found["runs"][0]["pruned_params"] <= 0.35
    assert found["largest_part"] == found["runs"][0]["pruned_params"]


def test_ratios_are_of_the_means_over_seeds() -> None:
    drops = {"mixed": (0.2, 0.4), "mean": (0.2, 0.2), "balanced": (0.1, 0.2)}
    runs = [{"arm": arm, "worst_drop": drop, "mean_drop": drop / 2} for arm, found in drops.items() for drop in found]
    found = bench_prune_mtl._spared(runs)
    assert found["ratio"] == pytest.approx({"mixed": 1.0, "mean": 2 / 3, "balanced": 0.5})
    assert found["met"]
