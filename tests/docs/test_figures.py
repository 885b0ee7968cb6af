import json
from pathlib import Path

from benchmarks import figures


def test_readme_shows_the_committed_results() -> None:
    text = figures.README.read_text(encoding="utf-8")
    shown = text.partition(figures.BEGIN)[2].partition(figures.END)[0]
    assert shown == figures.table(figures.RESULTS), "results are newer than README.md: python benchmarks/figures.py"


def test_a_claim_without_results_has_no_row(tmp_path: Path) -> None:
    found = {
        "command": "python benchmarks/bench_prune_cifar.py",
        "device": {"gpu": None, "cpu": "abacus", "threads": 1},
        "versions": {"torch": "2.15.0"},
        "settings": {"model": "layers:net", "rounds": 3, "epochs": 2},
        "rounds": [{"accuracy": 0.9, "macs_kept": 1.0}, {"accuracy": 0.8, "macs_kept": 0.5}],
    }
    (tmp_path / "bench_prune_cifar.json").write_text(json.dumps(found))
    assert figures.table(tmp_path).splitlines()[2:] == [
        "| net to 50% of the MACs, 3 rounds of 2 epochs | 90.00% -> 80.00% test accuracy "
        "| `python benchmarks/bench_prune_cifar.py` |",
        "",
        "Measured on: `bench_prune_cifar`: abacus, threads: 1, PyTorch 2.15.0.",
    ]
