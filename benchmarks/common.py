"""What every benchmark shares: fair timing, a description of where it ran, and results as JSON."""

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from torch import nn

import compress.attempt
import compress.pruning
from compress.checkpoint import load_state_dict, read_state_dict
from compress.folder import write_file
from scripts.sources import build_model

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # what the public CIFAR checkpoints expect

Stages = Mapping[str, float]  # seconds by name of the stage


def parser(file: str, claim: str) -> argparse.ArgumentParser:
    """Flags of the benchmark in ``file``: ``--output`` is where its JSON goes, by default beside those committed."""
    flags = argparse.ArgumentParser(description=claim, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--output", type=Path, default=RESULTS / f"{Path(file).stem}.json", help="JSON file to write")
    return flags


def checkpoint_parser(file: str, claim: str) -> argparse.ArgumentParser:
    """Flags of a benchmark that runs on checkpoints and images which are no part of prunus."""
    flags = parser(file, claim)
    flags.add_argument("--checkpoint", action="append", metavar="SOURCE:NAME=FILE@MACS,...", default=[],
                       help="a model, its weights and the fractions of MACs to keep; may be given again")  # fmt: skip
    flags.add_argument("--data", help="imagefolder:PATH (with train/ and test/), cifar10:PATH, cifar100:PATH or digits")
    flags.add_argument("--images", type=int, default=2048, help="training images without labels")
    flags.add_argument("--batch-size", type=int, default=128)
    flags.add_argument("--mean", type=float, nargs="+", default=IMAGENET_MEAN, help="per channel")
    flags.add_argument("--std", type=float, nargs="+", default=IMAGENET_STD, help="per channel")
    return flags


def parse_checkpoint(text: str) -> tuple[str, str, list[float]]:
    """Model, file and fractions of ``SOURCE:NAME=FILE@MACS,...``.

    >>> parse_checkpoint("layers:resnet20_cifar=resnet20.th@0.6,0.5")
    ('layers:resnet20_cifar', 'resnet20.th', [0.6, 0.5])
    """
    source, _, rest = text.partition("=")
    file, _, fractions = rest.rpartition("@")
    if not file or not fractions:
        raise ValueError(f"--checkpoint {text} is not of the form SOURCE:NAME=FILE@MACS,...")
    return source, file, [float(fraction) for fraction in fractions.split(",")]


def trained_model(source: str, file: str, num_classes: int) -> nn.Module:
    """The model that ``source`` names with the weights in ``file``, in evaluation mode."""
    model = build_model(source, num_classes)
    load_state_dict(model, read_state_dict(file), source=file)
    return model.eval()


@dataclass(frozen=True)
class Timing:
    """Seconds by stage: ``first`` in the first turn, when nothing is cached, ``median`` over the turns after it."""

    first: dict[str, float]
    median: dict[str, float]


def interleaved(contestants: Mapping[str, Callable[[], Stages]], repeats: int) -> dict[str, Timing]:
    """How long the stages of each contestant take; they take turns, so that a machine's drift meets all alike.

    A contestant does its work once and returns how long its stages took.
    """
    runs: dict[str, list[Stages]] = {name: [] for name in contestants}
    for _ in range(repeats + 1):
        for name, contestant in contestants.items():
            gc.collect()  # nobody pays for the garbage of the one before
            runs[name].append(contestant())
    return {
        name: Timing(dict(first), {stage: median(run[stage] for run in later) for stage in first})
        for name, (first, *later) in runs.items()
    }


# the parts of compress.prune that are timed, where it calls them from
PRUNE_STAGES = {
    "trace": (compress.pruning, "trace"),
    "apply": (compress.attempt, "apply"),
    "verify": (compress.attempt, "agrees"),
    "count": (compress.pruning, "record"),
}


@contextmanager
def stopwatch(stages: Mapping[str, tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """CPU seconds spent in some functions inside the block, and in ``total``.

    CPU time of the process, not time on the wall: on one thread the two agree on an idle machine, and only the former
    means anything on a busy one.

    ``stages`` maps the name of a stage to a function: the module or class that it is called from, and its name there.
    What is in none of them is up to the caller to name.
    """
    seconds = dict.fromkeys(stages, 0.0)

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[stage] += time.process_time() - begin

        return wrapper

    with ExitStack() as stack:
        for stage, (owner, name) in stages.items():
            stack.enter_context(patch.object(owner, name, timed(stage, getattr(owner, name))))
        start = time.process_time()
        yield seconds
        seconds["total"] = time.process_time() - start


def write_results(path: Path, argv: Sequence[str], results: Mapping[str, Any], packages: Sequence[str] = ()) -> None:
    """Write ``results`` with what is needed to read and repeat them; ``packages`` are peers whose version matters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "command": _command(path, argv),
        "commit": current_commit(),
        "device": _device(),
        "versions": {name: _version(name) for name in ("torch", "torchvision", "numpy", *packages)},
        **results,
    }
    text = json.dumps(document, indent=1) + "\n"
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _command(output: Path, argv: Sequence[str]) -> str:
    """The command without folders: results are read by people whose files lie elsewhere."""
    script = Path(sys.argv[0]).stem
    name = script if (ROOT / "benchmarks" / f"{script}.py").exists() else output.stem  # called from Python
    words = [re.sub(r"[^:=\s]*/", "", word) for word in argv]
    return " ".join(["python", f"benchmarks/{name}.py", *words])


def current_commit() -> str:
    """The commit that was measured, with ``+changes`` where tracked files differ from it."""
    try:
        show = ("git", "-C", str(ROOT))
        commit = subprocess.run((*show, "rev-parse", "--short=12", "HEAD"), check=True, capture_output=True, text=True)
        # the result files of other benchmarks are not what was measured
        status = (*show, "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
        changed = subprocess.run(status, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+changes" if changed else "")


def _device() -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def wide_console() -> Console:
    """Where tables go: as wide as the terminal, or wide enough where there is none (a log, a pipe)."""
    return Console(width=None if sys.stdout.isatty() else 120)


def skipped(reason: str) -> int:
    """Say why a benchmark did not run; that is no failure."""
    print(f"skipped: {reason}", file=sys.stderr)
    return 0
