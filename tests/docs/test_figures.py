import json
from pathlib import Path

from benchmarks import claims, figures


def test_readme_and_the_page_show_the_committed_results() -> None:
    text = figures.README.read_text(encoding="utf-8")
    shown = text.partition(figures.BEGIN)[2].partition(figures.END)[0]
    assert shown == figures.headlines(figures.RESULTS), "results are newer than README.md: python benchmarks/figures.py"
    written = figures.PAGE.read_text(encoding="utf-8")
    assert written == figures.page(figures.RESULTS), f"results are newer than {figures.PAGE}: benchmarks/figures.py"


def test_every_file_of_results_is_shown() -> None:
    named = {name for names in figures.SECTIONS.values() for name in names}
    assert {path.stem for path in figures.RESULTS.glob("*.json")} <= named
    assert set(figures.HEADLINES) <= named


def test_a_claim_without_results_has_no_row(tmp_path: Path) -> None:
    rows = [{"model": "layers:net", "budget": 0.5, "seed": 0, "method": "ours", "accuracy": 0.8}]
    rows += [{**rows[0], "budget": 0.25, "accuracy": 0.7}]
    found = {
        "command": "python benchmarks/bench_retrain.py --seeds 0 && python benchmarks/bench_retrain.py --seeds 1",
        "device": {"gpu": None, "cpu": "abacus", "threads": 1},
        "versions": {"torch": "2.15.0"},
        "settings": {"epochs": 2},
        "rows": rows,
    }
    (tmp_path / "bench_retrain.json").write_text(json.dumps(found))
    rows_shown = [
        "| net to 50.0% of the MACs, 2 epochs in all | test accuracy: 80.00% (prune, seeds: 1) |",
        "| net to 25.0% of the MACs, 2 epochs in all | test accuracy: 70.00% (prune, seeds: 1) |",
    ]
    assert figures.headlines(tmp_path).splitlines()[2:] == [
        f"{rows_shown[0]} `{found['command']}` |",
        "",
        "On abacus, threads: 1, PyTorch 2.15.0.",
    ]
    page = figures.page(tmp_path).splitlines()
    assert page[-4:] == ["| what | measured |", "|---|---|", *rows_shown]
    assert [line for line in page if line.startswith("#")] == ["# Measured", "## With training", "### bench_retrain"]
    assert "python benchmarks/bench_retrain.py --seeds 0 && \\" in page  # one command a line


def test_a_training_budget_is_shown_with_the_best_of_the_peer() -> None:
    rows = [{"model": "layers:net", "method": "dense", "accuracy": 0.95}]
    for method, accuracy in (("ours", 0.91), ("l1", 0.88), ("taylor", 0.90), ("l1+distill", 0.99)):
        for seed in (0, 1):
            measured = {"budget": 0.5, "seed": seed, "accuracy": accuracy + seed / 100}
            rows.append({"model": "layers:net", "method": method, **measured})
    found = {"settings": {"epochs": 10}, "rows": rows}
    (row,) = claims.retrained(found)
    assert row == (
        "net to 50.0% of the MACs, 10 epochs in all",
        "test accuracy: 91.50% (prune, seeds: 2); Torch-Pruning's best (taylor): 90.50% (seeds: 2)",
    )
    both = {"model": "layers:net", "method": "shrink", "budget": 0.5, "seed": 0, "accuracy": 0.93}
    ((_, figure),) = claims.retrained({"settings": {"epochs": 10}, "rows": [*rows[:3], both]})
    assert figure == "test accuracy: 93.00% (shrink, seeds: 1), 91.50% (prune, seeds: 2)"


def test_the_best_way_of_sharing_is_shown_where_all_seeds_are_there() -> None:
    alone = {"drawings": 2, "arm": "single-task", "seeds": 5, "accuracy": 0.7}
    gain = {"gain": 0.02, "gain_low": 0.01, "gain_high": 0.03}
    all_of_it = {"drawings": 2, "arm": "all", "seeds": 5, "accuracy": 0.72, **gain}
    interrupted = {**all_of_it, "arm": "first two", "seeds": 2, "gain": 0.05}
    assert claims.omniglot({"summary": [alone, all_of_it, interrupted]}) == [
        (
            "Omniglot, accuracy from 2 drawings of a character",
            "72.0% (all), 70.0% (a network per alphabet): +2.0 points (+1.0 to +3.0, seeds: 5)",
        ),
        ("from 2 drawings, all", "72.0%: +2.0 points (+1.0 to +3.0, seeds: 5)"),
    ]
    assert claims.omniglot({"summary": [alone, {**alone, "drawings": 1}]}) == []


def test_a_model_that_lacks_splits_is_not_the_best() -> None:
    names = ("independent ridge", "trace norm of deviations", "stack")
    spread = {"deviation": 0.01, "within": 0.28}
    lines = [
        {"train": 0.75, "model": name, "splits": splits, "explained": explained, **spread}
        for name, splits, explained in zip(names, (10, 10, 1), (0.35, 0.378, 0.39), strict=True)
    ]
    (_, figure), *every = claims.school({"summary": lines})
    assert figure.startswith("37.8% (trace norm of deviations)")
    assert [what for what, _ in every] == ["from 75%, trace norm of deviations", "from 75%, independent ridge"]
