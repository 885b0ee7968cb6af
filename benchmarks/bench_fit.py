"""How much faster a training step of `mtl.fit` with its defaults is than a plain loop, and whether it learns as much.

Claim: for ResNet-20 at batch 128 on one thread, what `fit` picks by default takes at most 1 / 2.2 of the time of an
eager loop in float32, with equal accuracy after 5 epochs. The gain of bf16 is that of the CPU's instructions for it,
which the results name; without them `fit` picks float32.

Steps are whole epochs over the same batches in memory, in CPU seconds of the process, in turns; `fit` pays for its
start, metrics and history. With --data both train for --epochs, and the accuracies are compared.

    python benchmarks/bench_fit.py
    python benchmarks/bench_fit.py --data cifar10:PATH --epochs 5
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import layers
from benchmarks.bench_no_training import accuracy_on_test
from benchmarks.common import IMAGENET_MEAN, IMAGENET_STD, Stages, interleaved, parser, wide_console, write_results
from mtl import FitOptions, Task, fit
from scripts.sources import open_data

LR, MOMENTUM, DECAY = 0.05, 0.9, 5e-4  # the defaults of fit
Batches = Iterable[tuple[Tensor, Tensor]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = parser(__file__, "a training step of mtl.fit against a plain loop")
    flags.add_argument("--model", default="resnet20_cifar", help="of layers.models")
    flags.add_argument("--batch-size", type=int, default=128)
    flags.add_argument("--steps", type=int, default=8, help="of a timed epoch")
    flags.add_argument("--repeats", type=int, default=7)
    flags.add_argument("--data", help="imagefolder:PATH or cifar10:PATH: also compare accuracies")
    flags.add_argument("--epochs", type=int, default=5, help="for the accuracies")
    flags.add_argument("--images", type=int, help="to train on for the accuracies; default: all")
    config = flags.parse_args(arguments)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"instructions": instructions()}
    results["seconds_per_step"] = seconds = timed_steps(config.model, config.batch_size, config.steps, config.repeats)
    results["times_as_fast_as_eager"] = {name: seconds["eager"] / value for name, value in seconds.items()}
    if config.data is not None:
        results["accuracy"] = accuracies(config.model, config.data, config.batch_size, config.epochs, config.images)
    write_results(config.output, arguments, results)
    table = Table("", "ms a step", "times as fast")
    for name, value in seconds.items():
        table.add_row(name, f"{1e3 * value:.1f}", f"{seconds['eager'] / value:.2f}")
    wide_console().print(table)
    wide_console().print(results.get("accuracy", ""))
    return 0


def instructions() -> list[str]:
    """What this CPU has for 16-bit numbers."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:  # not Linux
        return []
    return sorted(words & {"amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx2"})


def timed_steps(name: str, batch_size: int, steps: int, repeats: int) -> dict[str, float]:
    """CPU seconds of a step, by way."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(batch_size, 3, 32, 32, generator=generator), torch.randint(10, (batch_size,), generator=generator))
        for _ in range(steps)
    ]
    ways: dict[str, Callable[[nn.Module], None]] = {
        "eager": lambda model: by_hand(model, batches, 1),
        "channels-last": lambda model: by_hand(model, batches, 1, channels_last=True),
        "bf16, channels-last": lambda model: by_hand(model, batches, 1, channels_last=True, half=True),
        "fit": lambda model: by_fit(model, batches, 1),
    }

    def turn(train: Callable[[nn.Module], None]) -> Stages:
        model = build(name)
        start = time.process_time()
        train(model)
        return {"step": (time.process_time() - start) / steps}

    timings = interleaved({way: partial(turn, train) for way, train in ways.items()}, repeats)
    return {way: timing.median["step"] for way, timing in timings.items()}


def accuracies(name: str, source: str, batch_size: int, epochs: int, images: int | None) -> dict[str, float]:
    """On the test images after so many epochs, from the same weights, learning rates and batches."""
    data = open_data(source, mean=IMAGENET_MEAN, std=IMAGENET_STD, image_size=None, validation=0.0)
    train = data.loader("train", batch_size=batch_size, limit=images)
    found = {}
    for way, run in (("eager", by_hand), ("fit", by_fit)):
        model = build(name)
        run(model, train, epochs)
        found[way] = accuracy_on_test(model.eval(), data)
    return found


def build(name: str) -> nn.Module:
    """The same model at every call."""
    torch.manual_seed(0)
    model: nn.Module = getattr(layers.models, name)()
    return model


def by_fit(model: nn.Module, batches: Any, epochs: int) -> None:
    """As a user calls it."""
    fit(model, Task.classification("class"), batches, epochs, options=FitOptions(progress=False))


def by_hand(model: nn.Module, batches: Any, epochs: int, *, channels_last: bool = False, half: bool = False) -> None:
    """As it is usually written, with the optimiser, the schedule and the metrics that fit has by default."""
    if channels_last:
        model.to(memory_format=torch.channels_last)
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    model.train()
    for epoch in range(epochs):
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch + 1)
        total, right = 0.0, 0
        for x, y in batches:
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                logits = model(x.contiguous(memory_format=torch.channels_last) if channels_last else x)
                loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            right += int((logits.argmax(1) == y).sum())


if __name__ == "__main__":
    sys.exit(main())
