"""README.md's figures and docs/measured.md, from the committed results and from nowhere else.

Run ``python benchmarks/figures.py`` after a benchmark has written new results; a test compares both with them.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import claims
from benchmarks.claims import Results, Row
from benchmarks.common import RESULTS, ROOT
from compress.folder import write_file

README, PAGE = ROOT / "README.md", ROOT / "docs" / "measured.md"
BEGIN, END = "<!-- figures: written by benchmarks/figures.py -->\n", "<!-- end of figures -->\n"
INTRODUCTION = """\
# Measured

Every figure that this project claims, with the command that measures it again, from the files in \
`benchmarks/results`. Written by `benchmarks/figures.py`. Checkpoints, images and data sets are no part of prunus: the \
commands name where they lie. Times are medians of runs in turn with what they are compared with, in one process. The \
sweep over architectures has [a page of its own](zoo.md).
"""

SECTIONS: Mapping[str, Mapping[str, Callable[[Results], list[Row]]]] = {
    "Removing channels": {
        "zoo": claims.zoo,
        "bench_exactness": claims.exactness,
        "bench_trace": claims.trace,
        "bench_evidence": claims.evidence,
        "bench_latency": claims.latency,
    },
    "Without training": {
        "bench_shrink_r20": claims.shrunk,
        "bench_shrink_r56": claims.shrunk,
        "bench_no_training": claims.no_training,
        "bench_no_training_criteria": claims.criteria,
        "bench_whitening": claims.whitening,
    },
    "With training": {
        "bench_prune_cifar": claims.rounds,
        "bench_retrain": claims.retrained,
        "bench_retrain_shrink": claims.retrained,
        "bench_retrain_gpu": claims.retrained,
    },
    "Layers": {
        "bench_inference": claims.inference,
        "bench_fit": claims.training_step,
        "bench_kernels_memory": claims.memory,
        "bench_recurrent": claims.recurrent,
    },
    "Several tasks": {
        "bench_school": claims.school,
        "bench_omniglot": claims.omniglot,
        "bench_mtl_step": claims.weighting_step,
        "bench_soft_sharing": claims.soft_sharing,
        "bench_soft_sharing_collapse": claims.collapsed,
        "bench_prune_mtl": claims.spared,
        "bench_prune_mtl_stack": claims.stack,
    },
}
HEADLINES = {  # how many rows of each README.md shows
    "zoo": 1,
    "bench_exactness": 1,
    "bench_trace": 1,
    "bench_shrink_r56": 5,
    "bench_retrain": 1,
    "bench_retrain_shrink": 1,
    "bench_inference": 1,
    "bench_school": 2,
    "bench_omniglot": 3,
    "bench_soft_sharing": 2,
}


def main() -> None:
    """Write the table into README.md, between its two marks, and the page."""
    text = README.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    new = head + BEGIN + headlines(RESULTS) + END + tail
    write_file(README, lambda partial: partial.write_text(new, encoding="utf-8"))
    write_file(PAGE, lambda partial: partial.write_text(page(RESULTS), encoding="utf-8"))


def headlines(results: Path) -> str:
    """Markdown: a row for each claim whose results are in the folder, and where they were measured."""
    rows, places = [], dict[str, None]()
    for section in SECTIONS:
        for name, found, described in _found(results, section):
            shown = described[: HEADLINES.get(name, 0)]
            commands = [f"`{found['command']}`", *["the same"] * len(shown)]
            rows += [f"| {what} | {figure} | {how} |" for (what, figure), how in zip(shown, commands, strict=False)]
            places |= {_place(found): None} if shown else {}
    return "\n".join(["| what | measured | command |", "|---|---|---|", *rows, "", f"On {'; '.join(places)}."]) + "\n"


def page(results: Path) -> str:
    """Markdown: all rows, under the command that they are from."""
    parts = [INTRODUCTION]
    for section in SECTIONS:
        of_section = [_part(name, found, described) for name, found, described in _found(results, section)]
        parts += [f"## {section}\n", *of_section] if of_section else []
    return "\n".join(parts)


def _part(name: str, found: Results, described: Sequence[Row]) -> str:
    lines = [f"### {name}", "", "```sh", _broken(found["command"]), "```", "", f"{_place(found)}.", ""]
    lines += ["| what | measured |", "|---|---|"]
    lines += [f"| {what} | {figure.replace('docs/', '')} |" for what, figure in described]
    return "\n".join(lines) + "\n"


def _found(results: Path, section: str) -> Iterator[tuple[str, Results, list[Row]]]:
    for name, describe in SECTIONS[section].items():
        path = results / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            yield name, found, describe(found)


def _place(found: Results) -> str:
    device = found["device"]
    place = device["gpu"] or f"{device['cpu']}, threads: {device['threads']}"
    return f"{place}, PyTorch {found['versions']['torch']}"


def _broken(command: str) -> str:
    """One command a line."""
    return command.replace(" && ", " && \\\n")


if __name__ == "__main__":
    main()
