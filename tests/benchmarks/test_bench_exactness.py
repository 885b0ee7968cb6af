import json
from pathlib import Path

import pytest

from benchmarks import bench_exactness
from compress.plan import PrunePlan


def test_passes_on_a_small_network(tmp_path: Path) -> None:
    output = tmp_path / "bench_exactness.json"
    assert bench_exactness.main(["--models", "layers:resnet20_cifar", "--output", str(output)]) == 0
    (result,) = json.loads(output.read_text())["results"]
    assert result["failure"] == ""
    assert result["max_abs_error"] <= 1e-5 < result["mask_effect"]
    assert 0.42 < result["macs_kept"] <= 0.5


def test_fails_where_the_two_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_exactness.compress, "mask", lambda model, plan: model)
    output = tmp_path / "bench_exactness.json"
    assert bench_exactness.main(["--models", "layers:resnet20_cifar", "--output", str(output)]) == 1
    assert "error" in json.loads(output.read_text())["results"][0]["failure"]


def test_fails_where_the_budget_is_missed_or_the_plan_is_not_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrunePlan, "exact", property(lambda plan: False))
    monkeypatch.setattr(bench_exactness, "LOWEST_KEPT", 0.5)
    output = tmp_path / "bench_exactness.json"
    assert bench_exactness.main(["--models", "layers:resnet20_cifar", "--output", str(output)]) == 1
    failure = json.loads(output.read_text())["results"][0]["failure"]
    assert "not exact" in failure
    assert "MACs" in failure
