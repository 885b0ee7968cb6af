import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import zoo, zoo_examine, zoo_table
from benchmarks.zoo_models import FAMILIES, Entry, entries
from compress.plan import PrunePlan


def _network() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)
    return nn.Sequential(*layers)


def _entry(**changes: Any) -> Entry:
    fields = {"model": _network, "inputs": lambda batch: torch.randn(batch, 3, 8, 8), "size": "3 x 8 x 8"}
    return Entry("torchvision", "net", **{**fields, **changes})


def _result(**changes: Any) -> dict[str, Any]:
    return {"model": "torchvision:net", "size": "3 x 8 x 8", "engine": zoo.digest(), "failure": "", **changes}


# -- the list ----------------------------------------------------------------------------------------------------------


def test_the_list_covers_what_is_claimed() -> None:
    from timm.models import _registry
    from torchvision import models

    known = entries()
    names = [zoo.name_of(entry) for entry in known]
    assert len(set(names)) == len(names)
    of = {family: {entry.name for entry in known if entry.family == family} for family in FAMILIES}
    assert of["torchvision"] == set(models.list_models(module=models))
    assert len(of["torchvision"]) >= 80
    assert of["detection"] == set(models.list_models(module=models.detection))
    assert len({_registry._model_to_module[name] for name in of["timm"]}) >= 70
    transformers = ["bert", "gpt2", "llama", "mistral", "t5", "vit", "clip", "whisper", "detr", "segformer"]
    assert of["huggingface"] == {*transformers, "mamba", "convnextv2"}
    assert {e.name for e in known if e.family == "huggingface" and e.is_transformer} == set(transformers)


def test_names_choose_and_unknown_ones_are_refused() -> None:
    flow = entries(["flow"])
    assert [entry.name for entry in zoo.select(flow, ["flow:raft_small"])] == ["raft_small"]
    assert zoo.select(flow, []) == flow
    with pytest.raises(SystemExit, match="'raft_tiny'.*flow:raft_large"):
        zoo.select(flow, ["raft_tiny"])


# -- one model ---------------------------------------------------------------------------------------------------------


def test_a_model_that_prunes_passes() -> None:
    result = zoo_examine.examine(_entry(is_transformer=True))
    assert zoo.failures_of(result) == ""
    assert result["exact"]
    assert result["relative_error"] < 1e-10 < result["mask_effect"]
    assert 0.4 < result["macs_kept"] <= 0.5
    assert 0.4 < result["exact_only"]["macs_kept"] <= 0.5
    assert sum(result["seconds"][s] for s in ("trace", "plan", "apply", "verify", "count")) == pytest.approx(
        result["seconds"]["total"]
    )
    json.dumps(result)


def test_nothing_constant_is_left_to_hide_a_mistake() -> None:
    model, _ = zoo_examine.prepared(_entry())
    tensors = [t for t in [*model.parameters(), *model.buffers()] if t.numel() > 1]
    assert all((t != t.flatten()[0]).any() for t in tensors)
    assert float(model[1].running_var.min()) > 0  # type: ignore[union-attr, operator, arg-type]


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_examine.compress, "mask", lambda model, plan: model)
    assert "error" in zoo_examine.examine(_entry())["failure"]


def test_a_result_that_missed_the_budget_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_examine, "LOWEST_KEPT", 0.5)
    assert "MACs" in zoo_examine.examine(_entry())["failure"]


def test_an_inexact_plan_is_not_held_to_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrunePlan, "exact", property(lambda plan: False))
    monkeypatch.setattr(zoo_examine.compress, "mask", lambda model, plan: model)
    assert zoo_examine.examine(_entry())["failure"] == ""


class _SingleOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = _network(), torch.eye(4)  # no buffer: it stays in float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) @ self.scale  # type: ignore[no-any-return]


def test_a_model_that_refuses_float64_is_compared_in_float32() -> None:
    result = zoo_examine.examine(_entry(model=_SingleOnly))
    assert (result["failure"], result["precision"]) == ("", "float32")
    assert zoo_examine.examine(_entry())["precision"] == "float64"


def test_a_model_that_does_not_run_says_why() -> None:
    result = zoo_examine.examine(_entry(inputs=lambda batch: torch.randn(batch, 5, 8, 8)))
    assert result["failure"].startswith("prune: TraceError")


class _TrainsOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and len(x) != 2:
            raise ValueError("two, please")
        return self.net(x)  # type: ignore[no-any-return]


def test_both_modes_are_run_and_training_gets_its_own_inputs() -> None:
    entry = _entry(training_inputs=lambda batch: torch.randn(3, 3, 8, 8))
    assert zoo_examine.trains(_TrainsOnly(), _entry(), torch.randn(1, 3, 8, 8)) == ""
    assert "training mode: ValueError: two" in zoo_examine.trains(_TrainsOnly(), entry, torch.randn(1, 3, 8, 8))
    frozen = _network().requires_grad_(False)
    assert "evaluation mode" in zoo_examine.trains(frozen, _entry(), torch.randn(1, 3, 8, 8))


def test_outputs_that_are_infinite_in_the_same_places_are_equal() -> None:
    infinite = torch.tensor([1.0, -torch.inf])
    assert zoo_examine._difference([infinite], [infinite]) == 0
    assert zoo_examine._difference([infinite], [torch.ones(2)]) == float("inf")
    assert zoo_examine._difference([infinite], [torch.ones(3)]) == float("inf")


# -- the sweep ---------------------------------------------------------------------------------------------------------


def test_a_model_that_takes_too_long_fails_alone() -> None:
    assert zoo.in_a_process(_entry(), 0.01) == {"failure": "not done after 0.01 s"}


def test_a_model_is_examined_once_by_the_same_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examined = []

    def process(entry: Entry, limit: float, *flags: str) -> dict[str, Any]:
        examined.append(entry.name)
        return {"failure": "" if entry.name == "raft_small" else "broken"}

    monkeypatch.setattr(zoo, "in_a_process", process)
    output, progress = tmp_path / "zoo.json", tmp_path / "zoo.jsonl"
    flags = ["--family", "flow", "--output", str(output), "--progress", str(progress)]
    assert zoo.main([*flags, "--only", "raft_small"]) == 0
    assert zoo.main(flags) == 1
    assert examined == ["raft_small", "raft_large"]
    found = json.loads(output.read_text())["results"]
    assert {result["model"]: result["failure"] for result in found} == {
        "flow:raft_small": "",
        "flow:raft_large": "broken",
    }
    monkeypatch.setattr(zoo, "digest", lambda: "another")
    zoo.main([*flags, "--only", "raft_small"])
    zoo.main([*flags, "--only", "raft_small", "--fresh"])
    assert examined[2:] == ["raft_small"] * 2


def test_progress_survives_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "zoo.jsonl"
    lines = [json.dumps(_result(failure="old")), json.dumps(_result()), '{"model": "torchvis']
    path.write_text("\n".join(lines))
    assert zoo.read_progress(path) == {"torchvision:net": _result()}
    assert zoo.read_progress(tmp_path / "none") == {}


def test_exact_only_counts_as_well() -> None:
    assert zoo.passed(_result(exact_only={"failure": ""}))
    assert zoo.failures_of(_result(exact_only={"failure": "budget"})) == "exact_only: budget"


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_committed_results() -> None:
    found = json.loads((zoo_table.RESULTS / "zoo.json").read_text(encoding="utf-8"))
    shown = zoo_table.PAGE.read_text(encoding="utf-8")
    assert shown == zoo_table.page(found), "results are newer than docs/zoo.md: python benchmarks/zoo_table.py"


def test_the_page_has_one_line_a_model_and_says_what_failed() -> None:
    measured = {"exact": True, "inexact": {}, "relative_error": 1e-15, "macs_kept": 0.499, "num_groups": 2,
                "seconds": {"trace": 0.1, "plan": 0.05, "apply": 0.02, "verify": 0.03, "total": 0.2}, "model_mb": 40.0,
                "peak_mb": 60.0, "frozen": {"reason": 3}, "notes": []}  # fmt: skip
    peer = {"failure": "", "seconds": {"trace": 0.3, "step": 0.1}}
    broken = _result(model="torchvision:other", failure="prune: a | b")
    document = {
        "results": [_result(**measured, peer=peer), broken],
        "device": {"cpu": "abacus", "threads": 1},
        "versions": {"torch": "2.15.0", "timm": None},
    }
    page = zoo_table.page(document)
    assert (
        "| net | 3 x 8 x 8 | yes | yes | 1e-15 | 0.499 | - | 100 | 50 | 20 | 2.5 x | 2 | 3 |  | 300 + 100 ms |" in page
    )
    assert "| other | 3 x 8 x 8 | no | - | - | - | - | - | - | - | - | - | - | prune: a \\| b | - |" in page
    assert "| torchvision | 2 | 1 | 1 | 1 of 1 |" in page
    assert "takes 2.00 times the CPU seconds" in page
