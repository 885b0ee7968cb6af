import json
from pathlib import Path

import pytest

from benchmarks import bench_evidence


def test_times_every_kind_of_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_evidence, "CASES", (("layers:resnet20_cifar", 32, 4, 2),))
    output = tmp_path / "result.json"
    assert bench_evidence.main(["--repeats", "1", "--output", str(output)]) == 0
    (found,) = json.loads(output.read_text())["results"]
    assert found["ratio"]["forward"] == 1
    assert set(found["seconds"]) == {"forward", "activations", "with Grams", "gradients"}
    assert min(found["seconds"].values()) > 0
