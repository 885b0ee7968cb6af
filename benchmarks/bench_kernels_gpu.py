"""Batch norm + residual + ReLU against the copy bandwidth, and the ResNet-50 training step, on a CUDA GPU.

The bandwidth is measured: a device-to-device copy of the same tensor, bytes read plus bytes written. Forward must move
x twice, the residual once and y once; backward dy, x and y twice, dx and dz once. The training step is bfloat16,
channels-last: eager, `layers.memory_efficient`, `layers.optimize_for_training` and `torch.compile`. Medians of
CUDA event times.

    python benchmarks/bench_kernels_gpu.py
    python benchmarks/bench_kernels_gpu.py --dry-run    # tiny, on the CPU: shows that it runs, measures nothing
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torchvision
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common import parser, skipped, wide_console, write_results
from layers import memory_efficient, optimize_for_training
from layers.functional import bn_act


def seconds(run: Callable[[], object], repeats: int, device: str) -> float:
    """Median time of `run`, after three to warm up."""
    times = []
    for i in range(repeats + 3):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            elapsed = begin.elapsed_time(end) / 1e3
        else:
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
        if i >= 3:
            times.append(elapsed)
    return median(times)


def norm_bandwidth(shape: tuple[int, ...], channels_last: bool, device: str, repeats: int) -> dict[str, Any]:
    """Fraction of the copy bandwidth that forward and backward reach."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    x, residual, dy = (
        torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=form) for _ in range(3)
    )
    weight, bias = torch.ones(shape[1], device=device), torch.zeros(shape[1], device=device)
    target, size = torch.empty_like(x), x.numel() * x.element_size()
    copy = 2 * size / seconds(lambda: target.copy_(x), repeats, device)
    forward = seconds(lambda: bn_act(x, residual, weight=weight, bias=bias), repeats, device)
    inputs = [t.requires_grad_() for t in (x, residual, weight, bias)]
    y, _, _ = bn_act(inputs[0], inputs[1], weight=inputs[2], bias=inputs[3])
    backward = seconds(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True), repeats, device)
    return {
        "shape": list(shape),
        "channels_last": channels_last,
        "copy_bytes_per_second": copy,
        "forward_fraction": 4 * size / forward / copy,
        "backward_fraction": 8 * size / backward / copy,
    }


def training_steps(batch: int, size: int, device: str, repeats: int, compiled: bool) -> dict[str, float]:
    """Seconds of a training step of ResNet-50, by way."""
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=device)
    loss = nn.CrossEntropyLoss()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            value: Tensor = loss(model(x), labels)
        value.backward()
        optimizer.step()
        return value

    ways: dict[str, Callable[[nn.Module], Any]] = {
        "eager": lambda model: model,
        "memory_efficient": memory_efficient,
        "optimize_for_training": optimize_for_training,
    }
    if compiled:
        ways["compile"] = torch.compile
    result = {}
    for name, make in ways.items():
        model = make(torchvision.models.resnet50().to(device, memory_format=torch.channels_last))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        result[name] = seconds(partial(step, model, optimizer), repeats, device)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the results."""
    flags = parser(__file__, "fused batch norm against the copy bandwidth; ResNet-50 training step")
    flags.add_argument("--repeats", type=int, default=30, help="timed runs of each")
    flags.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    options = flags.parse_args(argv)
    device = "cpu" if options.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        return skipped("no CUDA GPU; --dry-run runs tiny inputs on the CPU")
    shapes = [(2, 16, 8, 8)] if options.dry_run else [(256, 256, 56, 56), (256, 512, 28, 28), (256, 2048, 7, 7)]
    repeats = 1 if options.dry_run else options.repeats
    norms = [norm_bandwidth(shape, last, device, repeats) for shape in shapes for last in (True, False)]
    steps = training_steps(*((2, 32) if options.dry_run else (256, 224)), device, repeats, not options.dry_run)
    table = Table("shape", "channels-last", "forward", "backward", title="fraction of the copy bandwidth")
    for row in norms:
        table.add_row(
            str(row["shape"]),
            str(row["channels_last"]),
            f"{row['forward_fraction']:.2f}",
            f"{row['backward_fraction']:.2f}",
        )
    console = wide_console()
    console.print(table)
    console.print({name: f"{value / steps['eager']:.2f} x eager" for name, value in steps.items()})
    results = {"dry_run": options.dry_run, "norms": norms, "resnet50_step_seconds": steps}
    write_results(options.output, argv if argv is not None else sys.argv[1:], results, ("triton",))
    return 0


if __name__ == "__main__":
    sys.exit(main())
