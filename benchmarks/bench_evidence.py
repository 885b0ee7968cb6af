"""What evidence for criteria costs beside a plain forward pass over the same images, on one core.

Claims: all activation criteria together are had for at most 1.1 x the time of a plain forward pass; with the Gram
matrices of all layers, in the same pass, for at most 3 x.

They take turns on the same images; gradients, which need a backward pass as well, are timed beside them. Ratios are
medians over turns, so that a machine that slows down meets both alike.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from rich.table import Table
from torch import Tensor, nn

import compress
from benchmarks.common import parser, stopwatch, wide_console, write_results
from compress.activations import ActivationCollector, collect_activations
from compress.channels import ChannelGraph
from compress.gradients import collect_gradients
from compress.gram import GramCollector, removable_sites
from compress.watch import Collector, gather
from scripts.sources import build_model

CASES = (  # model, image size, images, batch
    ("layers:resnet20_cifar", 32, 512, 128),
    ("layers:resnet56_cifar", 32, 512, 128),
    ("layers:resnet56_cifar", 32, 512, 256),
    ("torchvision:resnet50", 224, 32, 8),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = parser(__file__, "cost of calibration evidence beside a plain forward pass, on one core")
    flags.add_argument("--repeats", type=int, default=5)
    flags.add_argument("--no-gradients", action="store_true", help="leave them out")
    config = flags.parse_args(arguments)
    torch.set_num_threads(1)
    results = []
    for name, size, images, batch in CASES:
        torch.manual_seed(0)
        model = build_model(name, 1000 if size == 224 else 10).eval()
        data = [(torch.randn(batch, 3, size, size), torch.randint(10, (batch,))) for _ in range(images // batch)]
        graph = compress.trace(model, data[0][0][:1])
        contestants: dict[str, Callable[[], object]] = {
            "forward": partial(_forward, model, data),
            "activations": partial(collect_activations, model, graph, data),
            "with Grams": partial(_all, model, graph, data),
        }
        if not config.no_gradients:
            contestants["gradients"] = partial(collect_gradients, model, graph, data)
        turns = [{name: _seconds(run) for name, run in contestants.items()} for _ in range(config.repeats + 1)][1:]
        seconds = {name: median(turn[name] for turn in turns) for name in contestants}
        ratio = {name: median(turn[name] / turn["forward"] for turn in turns) for name in contestants}
        results.append({"model": name, "images": images, "batch": batch, "seconds": seconds, "ratio": ratio})
    _print(results)
    write_results(config.output, arguments, {"settings": {"repeats": config.repeats}, "results": results})
    return 0


def _forward(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for images, _ in data:
            model(images)


def _all(model: nn.Module, graph: ChannelGraph, data: Sequence[tuple[Tensor, Tensor]]) -> None:
    collectors: list[Callable[[], Collector]] = [
        lambda: ActivationCollector(graph),
        lambda: GramCollector(removable_sites(graph), len(data)),
    ]
    gather(model, graph.trace, data, collectors)


def _seconds(function: Callable[[], object]) -> float:
    with stopwatch({}) as seconds:
        function()
    return seconds["total"]


def _print(results: Sequence[dict]) -> None:
    table = Table(title="time relative to a plain forward pass", title_justify="left")
    for column in ("model", "images", "batch", *results[0]["ratio"]):
        table.add_column(column, justify="left" if column == "model" else "right")
    for found in results:
        table.add_row(
            found["model"], str(found["images"]), str(found["batch"]), *(f"{r:.3f}" for r in found["ratio"].values())
        )
    wide_console().print(table)


if __name__ == "__main__":
    sys.exit(main())
