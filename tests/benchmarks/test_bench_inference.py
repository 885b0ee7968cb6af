import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_inference
from benchmarks.bench_inference import _summary


@pytest.mark.slow
def test_every_contestant_is_timed(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    flags = ["--models", "layers:resnet20_cifar", "--batches", "1", "--threads", "1", "--seconds", "0.1", "--quick"]
    assert bench_inference.main([*flags, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert {"eager", "folded channels-last", "TorchScript", "ours: torch"} <= set(found["results"][0]["milliseconds"])
    assert found["summary"]["torch_against_eager_least"] > 0


def test_calls_may_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(name: str, batch: int, budget: float, *, quick: bool) -> dict[str, Any]:
        return {"milliseconds": {"eager": budget * batch, "ours: torch": 1.0}, "auto_chose": []}

    monkeypatch.setattr(bench_inference, "_measure", measured)
    output = tmp_path / "result.json"
    flags = ["--models", "a", "--threads", "1", "--output", str(output)]
    for batch, seconds, more in (("2", "1", []), ("4", "1", ["--add"]), ("2", "3", ["--add"])):
        assert bench_inference.main([*flags, "--batches", batch, "--seconds", seconds, *more]) == 0
    found = json.loads(output.read_text())
    eager = {row["batch"]: row["milliseconds"]["eager"] for row in found["results"]}
    assert eager == {2: 6.0, 4: 4.0}
    assert found["summary"]["torch_against_eager_least"] == 4.0


def test_the_summary_compares_with_the_best_of_each_row() -> None:
    first = {"eager": 4.0, "TorchScript": 2.0, "onnxruntime": 1.0, "ours: torch": 1.0, "ours: auto": 1.0}
    second = {"eager": 8.0, "TorchScript": 8.0, "onnxruntime": 4.0, "ours: torch": 4.0, "ours: auto": 5.0}
    assert _summary([{"milliseconds": first}, {"milliseconds": second}]) == {
        "torch_against_best_of_pytorch": 2.0,
        "torch_against_best_of_pytorch_least": 2.0,
        "torch_against_eager_least": 2.0,
        "auto_against_best_installed_least": 0.8,
    }
