"""How long pruning to half of the MACs takes on one core, beside Torch-Pruning, stage by stage.

Claims: ResNet-50 is traced in at most 0.5 s, and planned and cut in at most 2 s more.

What is compared: prunus finds channels in evaluation and training mode, meets a MACs budget exactly, cuts a copy,
checks the copy against its masked twin and counts its MACs. Torch-Pruning builds its dependency graph and removes one
fraction of all channels in place, in one step; it takes no MACs budget and checks nothing. Both rank channels by
squared weights over the whole model.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from rich.table import Table
from torch import Tensor, nn

import compress
from benchmarks.common import (
    PRUNE_STAGES,
    Stages,
    Timing,
    interleaved,
    parser,
    skipped,
    stopwatch,
    wide_console,
    write_results,
)
from scripts.sources import build_model

MODELS = ("torchvision:resnet50", "torchvision:mobilenet_v2", "torchvision:densenet121")
# stage -> function that compress.prune calls for it; the rest of its time is scoring and selecting: the plan
COLUMNS = ("trace", "plan", "apply", "verify", "count", "total")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = parser(__file__, "pruning time, stage by stage, on one core")
    flags.add_argument("--models", nargs="+", default=list(MODELS), help="SOURCE:NAME, as for prunus prune")
    flags.add_argument("--image-size", type=int, default=224)
    flags.add_argument("--macs", type=float, default=0.5, help="fraction to keep")
    flags.add_argument("--repeats", type=int, default=5)
    flags.add_argument("--no-peers", action="store_true", help="time prunus alone")
    config = flags.parse_args(arguments)
    peers = not config.no_peers and find_spec("torch_pruning") is not None
    if not peers:
        skipped("Torch-Pruning; install it with: pip install -e '.[peers]', and leave --no-peers away")
    torch.set_num_threads(1)
    results = []
    for name in config.models:
        torch.manual_seed(0)
        model = build_model(name, 1000).eval()
        example = torch.randn(1, _image_channels(model), config.image_size, config.image_size)
        kept: dict[str, float] = {}
        contestants = {"prunus": _prunus(model, example, config.macs, kept)}
        if peers:
            contestants["torch-pruning"] = _torch_pruning(model, example, config.macs, kept)
        timings = interleaved(contestants, config.repeats)
        results.append(
            {
                "model": name,
                "median_seconds": {contestant: timing.median for contestant, timing in timings.items()},
                "first_seconds": {contestant: timing.first for contestant, timing in timings.items()},
                "macs_kept": kept,
            }
        )
        _print(name, timings, kept)
    settings = {"image_size": config.image_size, "macs": config.macs, "repeats": config.repeats}
    write_results(config.output, arguments, {"settings": settings, "results": results}, ["torch-pruning"])
    return 0


def _prunus(model: nn.Module, example: Tensor, fraction: float, kept: dict[str, float]) -> Callable[[], Stages]:
    def run() -> Stages:
        with stopwatch(PRUNE_STAGES) as seconds:
            result = compress.prune(model, example, budget=compress.Budget(macs=fraction))
        plan = seconds["total"] - sum(seconds[stage] for stage in PRUNE_STAGES)
        kept["prunus"] = result.after.macs / result.before.macs
        return {**seconds, "plan": plan}

    return run


def _torch_pruning(model: nn.Module, example: Tensor, fraction: float, kept: dict[str, float]) -> Callable[[], Stages]:
    import torch_pruning

    dense = compress.measure(model, example).macs

    def run() -> Stages:
        victim = copy.deepcopy(model)  # it prunes in place; the copy is not part of its time
        with stopwatch({"trace": (torch_pruning.DependencyGraph, "build_dependency")}) as seconds:
            pruner = torch_pruning.pruner.BasePruner(
                victim,
                example,
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                global_pruning=True,
                pruning_ratio=1 - fraction**0.5,  # MACs go with the square of the width
                ignored_layers=[_last_layer(victim)],
            )
            pruner.step()
        kept["torch-pruning"] = compress.measure(victim, example).macs / dense
        return {**seconds, "plan + apply": seconds["total"] - seconds["trace"]}

    return run


def _last_layer(model: nn.Module) -> nn.Module:
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


def _image_channels(model: nn.Module) -> int:
    return next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))


def _print(name: str, timings: dict[str, Timing], kept: dict[str, float]) -> None:
    table = Table(title=f"{name}: seconds on one core", title_justify="left")
    for column in ("", *COLUMNS, "MACs kept"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    rows = [(f"{contestant}, median", timing.median) for contestant, timing in timings.items()]
    rows += [(f"{contestant}, first call", timing.first) for contestant, timing in timings.items()]
    for label, stages in rows:
        cells = [f"{stages[column]:.3f}" if column in stages else "-" for column in COLUMNS]
        if "plan + apply" in stages:
            cells[1:3] = [f"{stages['plan + apply']:.3f}", "in plan"]
        table.add_row(label, *cells, f"{kept[label.partition(',')[0]]:.1%}")
    console = wide_console()
    console.print(table)
    ours = timings["prunus"].median
    unchecked = ours["plan"] + ours["apply"]
    line = f"prunus: plan + apply {unchecked:.3f} s, with verification {unchecked + ours['verify']:.3f} s"
    if "torch-pruning" in timings:
        theirs = timings["torch-pruning"].median
        peer = theirs["plan + apply"]
        line += (
            f"; relative to torch-pruning: trace {ours['trace'] / theirs['trace']:.2f} x, plan + apply "
            f"{unchecked / peer:.2f} x, everything {ours['total'] / theirs['total']:.2f} x"
        )
    console.print(line)


if __name__ == "__main__":
    sys.exit(main())
