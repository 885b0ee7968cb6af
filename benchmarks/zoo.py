"""If it runs, it prunes: every architecture of torchvision, families of timm and Hugging Face, to half of the MACs.

Claims, for each model, with random weights: ``compress.prune`` with ``Budget(macs=0.5)`` succeeds; MACs kept are in
(0.40, 0.50]; the result runs forward and backward in evaluation and in training mode; where the plan is exact, the
result differs from its masked twin by at most 1e-5 of the output's scale in float64; for transformers all that holds
with ``exact_only=True`` as well. The exit status is 1 where one of them fails.

Each model runs in a process of its own, on one thread, within a time limit. Progress goes to ``--progress``, a line of
JSON a model; a model that was examined with the same sources of ``compress`` is not examined again. The table in
docs/zoo.md is written from the results: ``python benchmarks/zoo_table.py``.

With ``--peer``, Torch-Pruning prunes half of the channels of the same models, within 90 s each.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.common import ROOT, parser, wide_console, write_results
from benchmarks.zoo_examine import FRACTION, examine, examine_peer
from benchmarks.zoo_models import FAMILIES, Entry, entries

PACKAGES = ("timm", "transformers", "torch-pruning")

Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; exit status 0 if all models pass, else 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    config = _flags().parse_args(arguments)
    chosen = select(entries(config.family), config.only)
    torch.set_num_threads(1)
    if config.here is not None:
        (entry,) = chosen
        config.here.write_text(json.dumps(examine_peer(entry) if config.peer else examine(entry)), encoding="utf-8")
        return 0
    results = _sweep(chosen, config)
    print_table(results)
    progress = read_progress(config.progress)
    all_known = [progress[key] for entry in entries(FAMILIES) if (key := name_of(entry)) in progress]
    settings = {"macs": FRACTION, "limit_seconds": config.limit_seconds, "engine": digest()}
    write_results(config.output, arguments, {"settings": settings, "results": all_known}, PACKAGES)
    failed = [result for result in results if not passed(result)]
    print(f"{len(results) - len(failed)} of {len(results)} models pass")
    return int(bool(failed))


def _flags() -> argparse.ArgumentParser:
    flags = parser(__file__, "prune every architecture to half of its MACs, and check the result")
    flags.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    flags.add_argument("--only", nargs="+", default=[], metavar="NAME", help="NAME or FAMILY:NAME")
    flags.add_argument("--limit-seconds", type=float, default=600.0, help="for each process")
    flags.add_argument("--peer-seconds", type=float, default=90.0, help="the same for Torch-Pruning")
    flags.add_argument("--jobs", type=int, default=1, help="processes at a time, one thread each")
    flags.add_argument("--peer", action="store_true", help="run Torch-Pruning as well")
    flags.add_argument("--fresh", action="store_true", help="examine again what was examined")
    flags.add_argument("--progress", type=Path, default=ROOT / "runs" / "zoo.jsonl", help="a line a model")
    flags.add_argument("--here", type=Path, help=argparse.SUPPRESS)  # examine in this process, write JSON there
    return flags


def select(known: Sequence[Entry], names: Sequence[str]) -> list[Entry]:
    """The entries with one of ``names``, or all if none is given.

    Raises:
        SystemExit: a name is none of theirs.
    """
    for name in names:
        if not any(name in (entry.name, name_of(entry)) for entry in known):
            raise SystemExit(f"no model {name!r} among {len(known)}; names look like {name_of(known[0])}")
    return [entry for entry in known if not names or entry.name in names or name_of(entry) in names]


def name_of(entry: Entry) -> str:
    """The name of an entry that no other has."""
    return f"{entry.family}:{entry.name}"


def digest() -> str:
    """What the results depend on: the sources of the engine and of the examination."""
    files = [*(ROOT / "compress").rglob("*.py"), ROOT / "benchmarks" / "zoo_examine.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:12]


def passed(result: Result) -> bool:
    """Whether a model passes, and where it is a transformer, with ``exact_only`` as well."""
    return not failures_of(result)


def failures_of(result: Result) -> str:
    """All reasons why a model fails, empty if it does not."""
    exactly = result.get("exact_only", {}).get("failure", "")
    return "; ".join(reason for reason in (result["failure"], exactly and f"exact_only: {exactly}") if reason)


def read_progress(path: Path) -> dict[str, Result]:
    """The latest result of every model by name; a line that was cut short counts as none."""
    found: dict[str, Result] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[result["model"]] = result
    return found


def _sweep(chosen: Sequence[Entry], config: argparse.Namespace) -> list[Result]:
    known = {} if config.fresh else read_progress(config.progress)
    config.progress.parent.mkdir(parents=True, exist_ok=True)

    def one(entry: Entry) -> Result:
        result, engine = known.get(name_of(entry), {}), digest()  # it may be worked on while this runs
        if result.get("engine") != engine:
            result = {"model": name_of(entry), "size": entry.size, "engine": engine, "peer": result.get("peer")}
            result |= in_a_process(entry, config.limit_seconds)
        if config.peer and not result["peer"]:
            result["peer"] = in_a_process(entry, config.peer_seconds, "--peer")
        if result is not known.get(name_of(entry)):
            with config.progress.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
        print(f"{result['model']}: {failures_of(result) or 'passed'}", file=sys.stderr, flush=True)
        return result

    with ThreadPoolExecutor(config.jobs) as pool:
        return list(pool.map(one, chosen))


def in_a_process(entry: Entry, limit_seconds: float, *flags: str) -> Result:
    """Examine one model in a process of its own: one that crashes, hangs or leaks takes nothing else with it."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.zoo", "--family", entry.family, "--only", entry.name]
        try:
            subprocess.run(
                [*command, *flags, "--here", str(output)], cwd=ROOT, timeout=limit_seconds, check=True,
                capture_output=True, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failure": f"not done after {limit_seconds:g} s"}
        except subprocess.CalledProcessError as problem:
            last = problem.stderr.strip().splitlines()[-1:] or [f"exit status {problem.returncode}"]
            return {"failure": f"process: {last[0][:600]}"}
        found: Result = json.loads(output.read_text(encoding="utf-8"))
        return found


def print_table(results: Sequence[Result]) -> None:
    """One row a model."""
    table = Table(title="pruned to half of the MACs, random weights, float64", title_justify="left")
    for column in ("model", "exact", "error", "MACs", "exact only", "trace ms", "plan ms", "apply ms", ""):
        table.add_column(column, justify="left" if column in ("model", "") else "right", no_wrap=column != "")
    for result in results:
        table.add_row(result["model"], *cells(result), failures_of(result) or "passed")
    wide_console().print(table)


def cells(result: Result) -> list[str]:
    """What was measured of one model, as text: exact, error, MACs, MACs with exact_only, trace, plan, apply in ms."""
    if "macs_kept" not in result:
        return ["-"] * 7
    exactly = result.get("exact_only", {}).get("macs_kept")
    milliseconds = [f"{1000 * result['seconds'][stage]:.0f}" for stage in ("trace", "plan", "apply")]
    error = f"{result['relative_error']:.0e}" if "relative_error" in result else "-"
    kept = [f"{result['macs_kept']:.3f}", "-" if exactly is None else f"{exactly:.3f}"]
    return ["yes" if result["exact"] else "no", error, *kept, *milliseconds]


if __name__ == "__main__":
    sys.exit(main())
