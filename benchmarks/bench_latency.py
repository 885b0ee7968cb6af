"""Whether a latency budget is met when the pruned model is measured again, interleaved with the dense one.

Claim: with a budget of 0.6 of ResNet-56's seconds the result takes more than 0.54 and at most 0.63 of them, for one
image and for 32. A pruned model with round_to="auto" is never slower than the dense one.

Weights are random: seconds do not depend on them. What was measured while pruning is not used.
"""

import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import compress
from benchmarks.common import parser, wide_console, write_results
from layers.clock import own_clock, wait
from scripts.sources import build_model

LOWEST, HIGHEST = 0.9, 1.05  # of the budget: what may be measured


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = parser(__file__, "measured latency of models that were pruned to a latency budget")
    flags.add_argument("--models", nargs="+", default=["layers:resnet56_cifar"], help="SOURCE:NAME")
    flags.add_argument("--image-size", type=int, default=32)
    flags.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="images at once")
    flags.add_argument("--latency", type=float, default=0.6, help="fraction to keep")
    flags.add_argument("--pairs", type=int, default=100, help="runs of each model, in turn")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--device", default="cpu")
    config = flags.parse_args(arguments)
    torch.set_num_threads(config.threads)
    results = []
    for name in config.models:
        for batch in config.batches:
            torch.manual_seed(0)
            model = build_model(name, 10).eval().to(config.device)
            images = torch.randn(batch, 3, config.image_size, config.image_size, device=config.device)
            for what, options in (
                (f"latency={config.latency}", {"budget": compress.Budget(latency=config.latency)}),
                ("macs=0.6, auto", {"budget": compress.Budget(macs=0.6), "round_to": "auto"}),
                ("macs=0.6", {"budget": compress.Budget(macs=0.6)}),
            ):
                results.append(
                    {"model": name, "batch": batch, "budget": what, **_pruned(model, images, options, config)}
                )
    _print(results)
    names = ("image_size", "latency", "pairs", "threads", "device")
    settings = {name: getattr(config, name) for name in names}
    write_results(config.output, arguments, {"settings": settings, "results": results})
    return 0


def _pruned(model: nn.Module, images: Tensor, options: dict[str, Any], config: Any) -> dict[str, Any]:
    start = time.perf_counter()
    result = compress.prune(model, images, **options)
    seconds = time.perf_counter() - start
    small = result.model.eval()
    ratio = _ratio(lambda: model(images), lambda: small(images), config.pairs, images.device)
    met = LOWEST * config.latency < ratio <= HIGHEST * config.latency if "latency" in options["budget"].metric else None
    return {
        "ratio": ratio,
        "met": met,
        "macs_kept": result.after.macs / result.before.macs,
        "seconds_to_prune": seconds,
        "notes": list(result.notes),
    }


def _ratio(dense: Callable[[], object], pruned: Callable[[], object], pairs: int, device: torch.device) -> float:
    """The median of seconds of the pruned model by those of the dense one, run right before it."""

    def seconds(run: Callable[[], object]) -> float:
        wait(device)
        start = clock()
        run()
        wait(device)
        return clock() - start

    clock = own_clock(device)

    with torch.no_grad():
        ratios = []
        for _ in range(pairs + 3):  # the first three warm up
            before = seconds(dense)
            ratios.append(seconds(pruned) / before)
    return median(ratios[3:])


def _print(results: Sequence[dict[str, Any]]) -> None:
    table = Table(title="seconds of the pruned model as a part of the dense model's", title_justify="left")
    for column in ("model", "images", "budget", "measured", "met", "MACs kept", "seconds to prune"):
        table.add_column(column, justify="left" if column in ("model", "budget") else "right")
    for found in results:
        met = "-" if found["met"] is None else "yes" if found["met"] else "no"
        kept, took = f"{found['macs_kept']:.1%}", f"{found['seconds_to_prune']:.1f}"
        table.add_row(found["model"], str(found["batch"]), found["budget"], f"{found['ratio']:.3f}", met, kept, took)
    wide_console().print(table)


if __name__ == "__main__":
    sys.exit(main())
