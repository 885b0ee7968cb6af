import json
from pathlib import Path

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


def test_the_summary_compares_with_the_best_of_each_row() -> None:
    first = {"eager": 4.0, "TorchScript": 2.0, "onnxruntime": 1.0, "ours: torch": 1.0, "ours: auto": 1.0}
    second = {"eager": 8.0, "TorchScript": 8.0, "onnxruntime": 4.0, "ours: torch": 4.0, "ours: auto": 5.0}
    assert _summary([{"milliseconds": first}, {"milliseconds": second}]) == {
        "torch_against_best_of_pytorch": 2.0,
        "torch_against_best_of_pytorch_least": 2.0,
        "torch_against_eager_least": 2.0,
        "auto_against_best_installed_least": 0.8,
    }
