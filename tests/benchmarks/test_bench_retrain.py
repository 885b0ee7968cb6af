import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from benchmarks import bench_retrain, bench_retrain_gpu
from layers.models import digits_cnn

TINY = ["--data", "digits", "--mean", "0.3", "--std", "0.4", "--images", "128", "--dry-run", "--epochs", "3"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    weights = tmp_path / "dense.safetensors"
    save_file(digits_cnn().state_dict(), weights)
    return f"layers:digits_cnn={weights}@0.6"


@pytest.mark.parametrize("bench", [bench_retrain, bench_retrain_gpu])
def test_says_what_it_needs_and_is_no_failure(bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert bench.main(["--output", str(output)]) == 0
    assert f"skipped: {bench.__name__.rpartition('.')[2]}.py needs --checkpoint" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.filterwarnings("ignore:too few calibration")  # a dry run has three batches
def test_a_dry_run_goes_through_all_of_it_and_resumes(checkpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    flags = [*TINY, "--checkpoint", checkpoint, "--output", str(output), "--folder", str(tmp_path / "runs")]
    assert bench_retrain_gpu.main([*flags, "--seeds", "0", "1"]) == 0
    dense, *ours = json.loads(output.read_text())["rows"]
    assert dense["method"] == "dense"
    assert [(row["method"], row["seed"]) for row in ours] == [("ours", 0), ("ours", 1)]
    assert all(0.5 < row["macs_kept"] <= 0.6 and 0 <= row["accuracy"] <= 1 for row in ours)
    assert str(tmp_path) not in output.read_text()
    assert bench_retrain_gpu.main([*flags, "--seeds", "0", "1"]) == 0
    assert json.loads(output.read_text())["rows"][1:] == ours, "a finished run is not run again"


def test_the_peer_meets_the_same_budget(checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    output = tmp_path / "result.json"
    methods = ["l1", "taylor+distill"]
    flags = [*TINY, "--checkpoint", checkpoint, "--output", str(output), "--seeds", "0", "--peer-rounds", "2"]
    assert bench_retrain.main([*flags, "--methods", *methods]) == 0
    rows = json.loads(output.read_text())["rows"][1:]
    assert [row["method"] for row in rows] == methods
    assert all(0.4 < row["macs_kept"] <= 0.6 for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "ours", "--checkpoint", "layers:digits_cnn"], "is not of the form"),
        (["--methods", "ours", "--checkpoint", "layers:digits_cnn=none.pt@0.5"], "does not exist"),
        (["--methods", "l1", "--peer-rounds", "9"], "--peer-rounds is 9"),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str], message: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    flags = flags if "--checkpoint" in flags else [*flags, "--checkpoint", checkpoint]
    assert bench_retrain.main([*TINY, *flags, "--output", str(output)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not output.exists()
