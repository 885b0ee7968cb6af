"""docs/zoo.md from the committed results of the sweep and from nowhere else: ``python benchmarks/zoo_table.py``.

Run it after ``benchmarks/zoo.py``; a test compares the page with the results.
"""

import json
from collections.abc import Iterable
from itertools import groupby
from statistics import geometric_mean
from typing import Any

from benchmarks.common import RESULTS, ROOT
from benchmarks.zoo import cells, failures_of
from compress.folder import write_file

PAGE = ROOT / "docs" / "zoo.md"
INTRODUCTION = """\
# Which architectures prune

Every model below has random weights and is pruned to half of its MACs by `compress.prune(model, inputs, \
budget=compress.Budget(macs=0.5))`, with no other option, in a process of its own on one core. A model is *ok* if its \
MACs end in (0.40, 0.50], the result runs forward and backward in evaluation and training mode, and, where the plan is \
exact, the result computes what its masked twin computes (float64, 1e-5 of the output's scale); for transformers \
all that holds with `exact_only=True` as well. Where a plan is not exact the last column says why: the remaining \
statistics differ.

Some transformers cannot be pruned so far exactly: their code reads the inner width of attention off the residual \
stream (`B, N, C = x.shape`, later `reshape(B, N, C)`), so that heads go only together with channels that pass a norm.

*error* is the largest difference from the masked twin, in units of the output's largest value (for plans that are \
not exact it says nothing about mistakes), *exact only* the MACs kept with `exact_only=True`. *memory* is the model \
and what pruning adds to the process at its peak, in units of the model. *frozen* counts parameter axes that stay \
whole for a reason other than being an input or an output.

Written by `benchmarks/zoo_table.py` from `benchmarks/results/zoo.json`.
"""
COLUMNS = ("model", "input", "ok", "exact", "error", "MACs", "exact only", "trace ms", "plan ms", "apply ms",
           "memory", "groups", "frozen", "remarks")  # fmt: skip
PEER_COLUMN = "Torch-Pruning"

Result = dict[str, Any]


def main() -> None:
    """Write the page."""
    text = page(json.loads((RESULTS / "zoo.json").read_text(encoding="utf-8")))
    write_file(PAGE, lambda partial: partial.write_text(text, encoding="utf-8"))


def page(found: dict[str, Any]) -> str:
    """The page for a document of results."""
    results, device, versions = found["results"], found["device"], found["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    parts = [INTRODUCTION, f"Measured on: {device['cpu']}, threads: {device['threads']}; {packages}.\n"]
    parts.append("\n".join(_totals(results)) + "\n")
    for family, members in groupby(results, _family):
        parts.append(f"## {family}\n\n" + "\n".join(_rows(list(members))) + "\n")
    return "\n".join(parts)


def _family(result: Result) -> str:
    return str(result["model"]).partition(":")[0]


def _totals(results: list[Result]) -> Iterable[str]:
    yield "| family | models | ok | exact | Torch-Pruning: runs after surgery |"
    yield "|---|---|---|---|---|"
    named = [(family, list(members)) for family, members in groupby(results, _family)]
    for family, members in [*named, ("all", results)]:
        ok = sum(not failures_of(result) for result in members)
        exact = sum(bool(result.get("exact")) for result in members)
        peers = [result["peer"] for result in members if result.get("peer")]
        peer = f"{sum(not peer['failure'] for peer in peers)} of {len(peers)}" if peers else "-"
        yield f"| {family} | {len(members)} | {ok} | {exact} | {peer} |"
    ratios = [
        sum(result["peer"]["seconds"].values()) / result["seconds"]["total"]
        for result in results
        if result.get("peer") and not result["peer"]["failure"] and "seconds" in result
    ]
    if ratios:
        yield ""
        factor = f"{geometric_mean(ratios):.2f} times the CPU seconds of `compress.prune`, verification included"
        yield f"Where both succeed ({len(ratios)} models), Torch-Pruning takes {factor} (geometric mean)."


def _rows(results: list[Result]) -> Iterable[str]:
    peers = any(result.get("peer") for result in results)
    columns = [*COLUMNS, *([PEER_COLUMN] if peers else [])]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for result in results:
        name = result["model"].partition(":")[2]
        memory = f"{1 + result['peak_mb'] / result['model_mb']:.1f} x" if _is_large(result) else "-"
        frozen = str(sum(result["frozen"].values())) if "frozen" in result else "-"
        ok = "no" if failures_of(result) else "yes"
        row = [name, result["size"], ok, *cells(result), memory, str(result.get("num_groups", "-")), frozen]
        row.append(_remarks(result))
        if peers:
            row.append(_peer(result.get("peer")))
        yield "| " + " | ".join(row) + " |"


def _is_large(result: Result) -> bool:
    """Of a model of a few megabytes the peak says what PyTorch keeps, not what pruning does."""
    return bool(result.get("peak_mb")) and result["model_mb"] >= 20


def _remarks(result: Result) -> str:
    remarks = [failures_of(result)] if failures_of(result) else []
    remarks += [f"not exact: {why}" for why in result.get("inexact", {})]
    if result.get("without_rule"):
        remarks.append("no rule for " + ", ".join(result["without_rule"]))
    if result.get("precision") == "float32":
        remarks.append("compared in float32")
    remarks += result.get("notes", [])
    return "; ".join(remarks).replace("|", "\\|").replace("\n", " ")


def _peer(peer: Result | None) -> str:
    if not peer:
        return "-"
    if peer["failure"]:
        return f"no: {peer['failure'][:80]}".replace("|", "\\|")
    seconds = peer["seconds"]
    return f"{1000 * seconds['trace']:.0f} + {1000 * seconds['step']:.0f} ms"


if __name__ == "__main__":
    main()
