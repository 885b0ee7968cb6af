"""Bytes that a training step keeps for its backward pass, and its time, relative to eager PyTorch.

Contestants: `layers.memory_efficient`, `torch.compile` with an activation memory budget of 0.5, and checkpointing of
every block. Bytes are those of distinct storages that autograd holds at the end of the forward pass, without
parameters and buffers: counted with hooks on saved tensors, and for a chain and for bottleneck blocks as what one more
block adds. The time is that of forward and backward on one thread, in CPU seconds of the process, in turns; the seconds
until the first step is done, compilation of every depth included, are on the wall.

    python benchmarks/bench_kernels_memory.py            # a few minutes
    python benchmarks/bench_kernels_memory.py --quick    # tiny inputs, to see that it runs
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torchvision
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from benchmarks.common import interleaved, parser, wide_console, write_results
from layers import memory_efficient


class Checkpointed(nn.Module):
    """Every block of a sequence computed again as a whole."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def chain(depth: int, channels: int) -> nn.Sequential:
    """Blocks of convolution 3 x 3, batch norm and ReLU."""
    return nn.Sequential(
        *[
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
            )
            for _ in range(depth)
        ]
    )


def bottlenecks(depth: int, channels: int) -> nn.Sequential:
    """Bottleneck blocks of ResNet-50 between so many channels."""
    return nn.Sequential(*[torchvision.models.resnet.Bottleneck(channels, channels // 4) for _ in range(depth)])


def resnet50(depth: int) -> nn.Module:
    """The whole network; it has one depth."""
    return torchvision.models.resnet50()


def budget(model: nn.Module) -> Callable[[Tensor], Any]:
    """torch.compile, told to keep half."""
    torch._dynamo.reset()
    torch._functorch.config.activation_memory_budget = 0.5
    return torch.compile(model)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that autograd holds after the forward pass."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def checkpointed_bytes(model: Checkpointed, x: Tensor) -> int:
    """Checkpoints hide what they keep from hooks: the input of every block."""
    total = 0
    with torch.no_grad():
        for block in model.blocks:
            total += x.untyped_storage().nbytes()
            x = block(x)
    return total


def step(model: nn.Module, x: Tensor) -> dict[str, float]:
    """CPU seconds of forward and backward."""
    start = time.process_time()
    model(x).square().mean().backward()
    seconds = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return {"step": seconds}


def measure(
    build: Callable[[int], nn.Module], x: Tensor, depths: tuple[int, int] | None, repeats: int, compiled: bool
) -> dict[str, Any]:
    """Kept bytes and seconds of every contestant, and both relative to eager."""
    contestants: dict[str, Callable[..., Any]] = {
        "eager": lambda model: model,
        "memory_efficient": memory_efficient,
    }
    if compiled:
        contestants["compile, budget 0.5"] = budget
    if depths is not None:
        contestants["checkpoint"] = Checkpointed
    kept, models, ready = {}, {}, {}
    for name, make in contestants.items():
        count: Callable[[Any, Tensor], int] = checkpointed_bytes if name == "checkpoint" else saved_bytes
        sizes = []
        start = time.perf_counter()
        for depth in depths or (1,):
            models[name] = make(build(depth))
            sizes.append(count(models[name], x))
        step(models[name], x)
        ready[name] = time.perf_counter() - start
        kept[name] = sizes[-1] - sizes[0] if depths else sizes[0]
    timings = interleaved({name: partial(step, model, x) for name, model in models.items()}, repeats)
    seconds = {name: timing.median["step"] for name, timing in timings.items()}
    return {
        name: {
            "kept_bytes": kept[name],
            "kept": kept[name] / kept["eager"],
            "seconds": seconds[name],
            "time": seconds[name] / seconds["eager"],
            "ready_after_seconds": ready[name],
        }
        for name in contestants
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the results."""
    flags = parser(__file__, "kept bytes and step time of training, relative to eager PyTorch")
    flags.add_argument("--repeats", type=int, default=7, help="timed turns")
    flags.add_argument("--quick", action="store_true", help="tiny inputs")
    flags.add_argument("--without-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    flags.add_argument("--only", nargs="*", help="models by name")
    options = flags.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = options.quick
    depths = (1, 2) if small else (4, 8)
    cases: Mapping[str, tuple[Callable[[int], nn.Module], tuple[int, ...], tuple[int, int] | None]] = {
        "chain": (partial(chain, channels=8 if small else 64), (2, 8, 8, 8) if small else (8, 64, 56, 56), depths),
        "bottlenecks": (
            partial(bottlenecks, channels=8 if small else 256),
            (2, 8, 8, 8) if small else (8, 256, 28, 28),
            depths,
        ),
        "resnet50": (resnet50, (2, 3, 32, 32) if small else (4, 3, 224, 224), None),
    }
    results = {}
    table = Table("model", "way", "kept", "time", title="relative to eager")
    for name, (build, shape, sizes) in cases.items():
        if options.only and name not in options.only:
            continue
        results[name] = measure(build, torch.randn(shape), sizes, options.repeats, not options.without_compile)
        for way, row in results[name].items():
            table.add_row(name, way, f"{row['kept']:.3f}", f"{row['time']:.3f}")
    wide_console().print(table)
    ratios = [way["memory_efficient"]["time"] for way in results.values()]
    write_results(
        options.output, argv if argv is not None else sys.argv[1:], {"models": results, "median_time": median(ratios)}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
