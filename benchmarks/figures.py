"""The figures in README.md, from the committed results and from nowhere else: ``python benchmarks/figures.py``.

Run it after a benchmark has written new results; a test compares README.md with them.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import RESULTS, ROOT
from benchmarks.zoo import failures_of
from compress.folder import write_file

README = ROOT / "README.md"
BEGIN, END = "<!-- figures: written by benchmarks/figures.py -->\n", "<!-- end of figures -->\n"


def main() -> None:
    """Write the table into README.md, between its two marks."""
    text = README.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    new = head + BEGIN + table(RESULTS) + END + tail
    write_file(README, lambda partial: partial.write_text(new, encoding="utf-8"))


def table(results: Path) -> str:
    """Markdown: a row for each claim whose results are in the folder, and where each was measured."""
    rows, places = [], []
    for name, describe in (
        ("zoo", _zoo),
        ("bench_exactness", _exactness),
        ("bench_trace", _trace),
        ("bench_prune_cifar", _accuracy),
        ("bench_no_training", _no_training),
        ("bench_shrink_r20", _shrink),
        ("bench_shrink_r56", _shrink),
        ("bench_retrain", _retrain),
        ("bench_retrain_shrink", _retrain),
        ("bench_retrain_gpu", _retrain),
        ("bench_school", _school),
        ("bench_omniglot", _omniglot),
        ("bench_mtl_step", _mtl_step),
        ("bench_soft_sharing", _soft_sharing),
        ("bench_soft_sharing_collapse", _collapse),
    ):
        path = results / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            rows += [f"| {what} | {figure} | `{found['command']}` |" for what, figure in describe(found)]
            device = found["device"]
            place = device["gpu"] or f"{device['cpu']}, threads: {device['threads']}"
            places.append(f"`{name}`: {place}, PyTorch {found['versions']['torch']}")
    lines = ["| what | measured | command |", "|---|---|---|", *rows, "", f"Measured on: {'; '.join(places)}."]
    return "\n".join(lines) + "\n"


def _zoo(found: dict[str, Any]) -> list[tuple[str, str]]:
    passed = sum(not failures_of(result) for result in found["results"])
    peers = [result["peer"] for result in found["results"] if result.get("peer")]
    ran = sum(not peer["failure"] for peer in peers)
    what = f"architectures pruned to {found['settings']['macs']:.0%} of their MACs that pass every check"
    peer = f"(Torch-Pruning {found['versions']['torch-pruning']}, half of the channels, runs afterwards: {ran})"
    return [(what, f"[{passed} of {len(found['results'])}](docs/zoo.md) {peer if peers else ''}".strip())]


def _exactness(found: dict[str, Any]) -> list[tuple[str, str]]:
    examined = [result for result in found["results"] if "exact" in result]
    passed = sum(not result["failure"] for result in found["results"])
    error = max(result["max_abs_error"] for result in examined)
    kept = [result["macs_kept"] for result in examined]
    what = f"exactness at {found['settings']['macs']:.0%} of the MACs: pruned model against masked twin, float64"
    figure = f"{passed} of {len(found['results'])} models; largest error {error:.1e}"
    return [(what, f"{figure}; MACs kept {min(kept):.2%} to {max(kept):.2%}")]


def _trace(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for result in found["results"]:
        ours, theirs = result["median_seconds"]["prunus"], result["median_seconds"].get("torch-pruning")
        first = result["first_seconds"]["prunus"]["trace"]
        figure = f"{ours['trace']:.2f} s (first call {first:.2f} s), "
        figure += f"{ours['plan'] + ours['apply']:.2f} s, {ours['verify']:.2f} s"
        if theirs:
            peer = f"Torch-Pruning {found['versions']['torch-pruning']}"
            figure += f" ({peer}: {theirs['trace']:.2f} s, {theirs['plan + apply']:.2f} s, verifies nothing)"
        name = result["model"].rpartition(":")[2]
        rows.append((f"{name} on one core: trace, plan and apply, verify", figure))
    return rows


def _accuracy(found: dict[str, Any]) -> list[tuple[str, str]]:
    settings, rounds = found["settings"], found["rounds"]
    what = (
        f"{settings['model'].rpartition(':')[2]} to {rounds[-1]['macs_kept']:.0%} of the MACs, "
        f"{settings['rounds']} rounds of {settings['epochs']} epochs"
    )
    return [(what, f"{rounds[0]['accuracy']:.2%} -> {rounds[-1]['accuracy']:.2%} test accuracy")]


def _no_training(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for row in found["rows"]:
        if row["method"] == "reconstruction, recovered":
            name = row["model"].rpartition(":")[2]
            what = (
                f"{name} to {row['macs_kept']:.1%} of the MACs without training, {found['settings']['images']} images"
            )
            rows.append((what, f"{row['accuracy']:.2%} test accuracy"))
    return rows


def _shrink(found: dict[str, Any]) -> list[tuple[str, str]]:
    """A row for each model: its budgets, and of each method the means over draws of images."""
    rows = [row for row in found["rows"] if "budget" in row and "accuracy" in row]
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        budgets, texts = sorted({row["budget"] for row in own}, reverse=True), []
        for method in ("shrink", "factorize", "prune"):
            values = {b: [r["accuracy"] for r in own if (r["method"], r["budget"]) == (method, b)] for b in budgets}
            means = " / ".join(f"{100 * mean(values[b]):.2f}" if values[b] else "-" for b in budgets)
            draws = " / ".join(str(len(values[b])) for b in budgets)
            texts += [f"{method} {means} % (draws: {draws})"] if any(values.values()) else []
        kept = " / ".join(f"{100 * budget:.3g}" for budget in budgets)
        what = (
            f"{model.rpartition(':')[2]} to {kept} % of the MACs without training, {found['settings']['images']} images"
        )
        lines.append((what, f"test accuracy: {'; '.join(texts)}"))
    return lines


def _retrain(found: dict[str, Any]) -> list[tuple[str, str]]:
    accuracies: dict[tuple[str, float], dict[str, list[float]]] = {}
    for row in found["rows"]:
        if "seed" in row:
            by_method = accuracies.setdefault((row["model"], row["budget"]), {})
            by_method.setdefault(row["method"], []).append(row["accuracy"])
    rows = []
    for (model, budget), methods in accuracies.items():
        means = {name: mean(values) for name, values in methods.items()}
        what = f"{model.rpartition(':')[2]} to {budget:.1%} of the MACs, {found['settings']['epochs']} epochs in all"
        names = {"ours": "prune", "shrink": "shrink"}
        own = [f"{means.pop(n):.2%} ({names[n]}, seeds: {len(methods[n])})" for n in ("shrink", "ours") if n in means]
        figure = f"test accuracy: {', '.join(own)}" if own else ""
        peers = {name: value for name, value in means.items() if "+" not in name}
        if best := max(peers, key=peers.__getitem__, default=None):
            figure += f"; Torch-Pruning's best ({best}): {peers[best]:.2%} (seeds: {len(methods[best])})"
        rows.append((what, figure.removeprefix("; ")))
    return rows


def _school(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for part in sorted({row["train"] for row in found["summary"]}, reverse=True):
        own = [row for row in found["summary"] if row["train"] == part]
        splits = max(row["splits"] for row in own)  # a model that lacks some, since a run was interrupted, is left out
        explained = {row["model"]: row["explained"] for row in own if row["splits"] == splits}
        best = max(explained, key=explained.__getitem__)
        alone, deviations = explained["independent ridge"], explained["trace norm of deviations"]
        figure = (
            f"{explained[best]:.1%} ({best}), {deviations:.1%} (trace norm of deviations), {alone:.1%} (each alone)"
        )
        rows.append((f"School data, variance explained from {part:.0%} of the students", figure))
    return rows


def _omniglot(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for drawings in sorted({line["drawings"] for line in found["summary"]}):
        lines = {line["arm"]: line for line in found["summary"] if line["drawings"] == drawings}
        alone = lines.get("single-task", {"seeds": 0})
        gains = [line for line in lines.values() if "gain" in line and line["seeds"] == alone["seeds"]]
        if gains:
            best = max(gains, key=lambda line: line["gain"])
            gain, low, high = (f"{100 * best[name]:+.1f}" for name in ("gain", "gain_low", "gain_high"))
            figure = f"{best['accuracy']:.1%} ({best['arm']}), {alone['accuracy']:.1%} (a network per alphabet): "
            figure += f"{gain} points ({low} to {high}, seeds: {best['seeds']})"
            number = f"{drawings} drawing{'s' if drawings > 1 else ''}"
            rows.append((f"Omniglot, accuracy from {number} of a character", figure))
    return rows


def _mtl_step(found: dict[str, Any]) -> list[tuple[str, str]]:
    ratios = found["ratios"]
    rows = [
        ("a step of `mtl.fit` with uncertainty weighting, by a loop written by hand", f"{ratios['uncertainty']:.2f}")
    ]
    for method, name in (("upgrad", "UPGrad"), ("pcgrad", "PCGrad")):
        if f"{method} over plain sum" in ratios:
            ours, theirs = ratios[f"{method} over plain sum"], ratios[f"torchjd's {method} over plain sum"]
            figure = f"{ours:.2f} (torchjd {found['versions']['torchjd']} by its documentation: {theirs:.2f})"
            rows.append(
                (f"a step with {name}, by one with the plain sum of {found['settings']['tasks']} losses", figure)
            )
    return rows


def _soft_sharing(found: dict[str, Any]) -> list[tuple[str, str]]:
    step, penalty, settings = found["step"], found["penalty"], found["settings"]
    what = f"time of a step of soft sharing, {settings['tasks']} ResNet-20s at batch {settings['batch']}"
    figure = f"{step['ratio']:.2f}, with trace norm {step['ratio_with_penalty']:.2f}"
    error = penalty["largest_relative_error_of_gradient"]
    speedup = f"{penalty['speedup']:.1f} times faster, largest error {error:.0e}"
    return [
        (f"{what}, relative to a loop over the models", figure),
        ("the trace norm of these stacks and its gradient, against `torch.linalg.svd`", speedup),
    ]


def _collapse(found: dict[str, Any]) -> list[tuple[str, str]]:
    kept, before, after = (
        found["collapse"][name]["mean"] for name in ("parameters_kept", "accuracy_before", "accuracy_after")
    )
    what = "five digits networks trained with the trace norm of deviations, collapsed"
    seeds = found["settings"]["seeds"]
    return [(what, f"{kept:.0%} of the parameters, {before:.2%} -> {after:.2%} accuracy (seeds: {seeds})")]


if __name__ == "__main__":
    main()
