"""How much faster models run after `layers.optimize_for_inference`, against every other way at hand, interleaved.

Claim: backend="torch" is in the geometric mean at least 1.1 x as fast as the best other way that PyTorch alone offers,
and never slower than eager; backend="auto" is at most 3 % behind the best that is installed.

Weights are random: seconds do not depend on them. On one thread, CPU seconds are counted, which mean something on a
busy machine too; two threads take a quiet machine, and OMP_NUM_THREADS=2. Installed beside PyTorch, onnxruntime (with
onnx and onnxscript) and openvino take part. Calls may share the work, each adding its models, batches and threads:

    python benchmarks/bench_inference.py --add --threads 1 --models torchvision:resnet18
"""

import copy
import itertools
import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import layers
from benchmarks.common import current_commit, parser, wide_console, write_results
from layers.clock import seconds
from layers.inference.backends import BACKENDS
from layers.inference.capture import Call, capture
from layers.inference.norms import fold_norms
from layers.inference.runner import BackendError
from layers.inference.simplify import simplify
from scripts.sources import build_model

IMAGE_SIZE = {"layers": 32}  # of a source of models; elsewhere 224
PYTORCH = ("eager", "folded channels-last", "TorchScript", "torch.compile")
MODELS = ("layers:resnet20_cifar", "layers:resnet56_cifar", "torchvision:resnet18", "torchvision:mobilenet_v2")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = parser(__file__, "seconds of a forward pass, by who runs it")
    flags.add_argument("--models", nargs="+", default=MODELS, help="SOURCE:NAME")
    flags.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="images at once")
    flags.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    flags.add_argument("--seconds", type=float, default=20.0, help="of measuring each model and batch")
    flags.add_argument("--add", action="store_true", help="keep what the output has of other models, batches, threads")
    flags.add_argument("--quick", action="store_true", help="without what compiles: torch.compile and auto")
    config = flags.parse_args(arguments)
    results = _earlier(config.output) if config.add else {}
    for cell in itertools.product(config.threads, config.models, config.batches):
        threads, name, batch = cell
        torch.set_num_threads(threads)
        found = _measure(name, batch, config.seconds, quick=config.quick)
        results[cell] = {"model": name, "batch": batch, "threads": threads, "commit": current_commit(), **found}
        results = dict(sorted(results.items()))
        rows = list(results.values())
        write_results(config.output, arguments, {"summary": _summary(rows), "results": rows}, PEERS)
        print(results[cell], flush=True)
    _print(rows, _summary(rows))
    return 0


def _earlier(path: Path) -> dict[tuple[int, str, int], dict[str, Any]]:
    """What the file has, by threads, model and batch."""
    rows = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    return {(row["threads"], row["model"], row["batch"]): row for row in rows}


PEERS = ("onnxruntime", "openvino")


@torch.no_grad()
def _measure(name: str, batch: int, budget: float, *, quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = build_model(name, 10).eval()
    size = IMAGE_SIZE.get(name.split(":")[0], 224)
    x = torch.randn(batch, 3, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        contestants = {**_by_pytorch(model, x, quick=quick), **_by_runtimes(model, x)}
        ours = {"torch": layers.optimize_for_inference(model, x)}
        if not quick:
            ours["auto"] = layers.optimize_for_inference(model, x, backend="auto")
        contestants |= {f"ours: {key}": partial(fast, x) for key, fast in ours.items()}
        for contestant in contestants.values():
            for _ in range(3):
                contestant()
        times = seconds(contestants, x.device, budget)
    chosen = [piece.backend for piece in ours["auto"].report.pieces] if "auto" in ours else []
    return {"milliseconds": {key: round(1e3 * value, 4) for key, value in times.items()}, "auto_chose": chosen}


def _by_pytorch(model: nn.Module, x: Tensor, *, quick: bool) -> dict[str, Callable[[], object]]:
    last = torch.channels_last
    folded = layers.fold_batch_norm(model).to(memory_format=last)
    scripted = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(model, x)))
    found: dict[str, Callable[[], object]] = {
        "eager": lambda: model(x),
        "folded channels-last": lambda: folded(x.contiguous(memory_format=last)),
        "TorchScript": lambda: scripted(x),
    }
    if not quick:
        compiled = torch.compile(copy.deepcopy(model), options={"freezing": True})
        found["torch.compile"] = lambda: compiled(x)
    return found


def _by_runtimes(model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    graph = capture(model, Call.of(model, x)).graph
    for rewrite in (simplify, fold_norms):
        rewrite(graph)
    found: dict[str, Callable[[], object]] = {}
    for name in PEERS:
        try:
            program = BACKENDS[name](graph, [x])
        except BackendError as error:
            print(f"{name} does not take part: {error}", file=sys.stderr)
            continue
        found[name] = partial(program.run, x)
    return found


def _summary(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Ratios of seconds: above 1 ours is faster."""
    times = [row["milliseconds"] for row in results]
    torch_ratios = [min(row[key] for key in PYTORCH if key in row) / row["ours: torch"] for row in times]
    summary = {
        "torch_against_best_of_pytorch": math.exp(sum(map(math.log, torch_ratios)) / len(torch_ratios)),
        "torch_against_best_of_pytorch_least": min(torch_ratios),
        "torch_against_eager_least": min(row["eager"] / row["ours: torch"] for row in times),
    }
    if all("ours: auto" in row for row in times):
        auto = [min(v for k, v in row.items() if k != "ours: auto") / row["ours: auto"] for row in times]
        summary["auto_against_best_installed_least"] = min(auto)
    return {key: round(value, 3) for key, value in summary.items()}


def _print(results: Sequence[Mapping[str, Any]], summary: Mapping[str, float]) -> None:
    table = Table(title="times as fast as eager", title_justify="left")
    names = list(dict.fromkeys(name for row in results for name in row["milliseconds"]))
    for column in ("model", "images", "threads", *names):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in results:
        times = row["milliseconds"]
        ratios = [f"{times['eager'] / times[name]:.2f}" if name in times else "-" for name in names]
        table.add_row(row["model"], str(row["batch"]), str(row["threads"]), *ratios)
    wide_console().print(table)
    wide_console().print(dict(summary))


if __name__ == "__main__":
    sys.exit(main())
