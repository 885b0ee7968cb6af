"""What a step of multi-task training costs, beside a loop written by hand.

Claims: ``mtl.fit`` with the weighting "uncertainty" takes at most 1.05 times as long as the same loop written by hand
(forward, losses, learnt log-variances, backward, SGD, and accuracy counted for each task, as ``fit`` does); UPGrad and
PCGrad on the features of the trunk take at most 1.5 times as long as the plain sum of T = 3 losses. The peer is torchjd
as its documentation uses it: the Jacobian of all parameters of the trunk.

All are whole epochs over the same batches; ``fit`` pays for its start, epoch and history as well.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import layers
from benchmarks.common import Stages, interleaved, parser, skipped, wide_console, write_results
from mtl import FitOptions, HardShared, Task, fit

CLASSES = {"a": 10, "b": 10, "c": 10}
WIDTH = 64

Batches = list[tuple[Tensor, dict[str, Tensor]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = parser(__file__, "a step of multi-task training, beside a loop written by hand")
    flags.add_argument("--batch-size", type=int, default=64)
    flags.add_argument("--image-size", type=int, default=32)
    flags.add_argument("--steps", type=int, default=40, help="of an epoch")
    flags.add_argument("--repeats", type=int, default=7)
    config = flags.parse_args(arguments)
    torch.set_num_threads(1)
    batches = _batches(config.steps, config.batch_size, config.image_size)
    contestants: dict[str, Callable[[], Stages]] = {
        "sum by hand": lambda: _timed(_by_hand, batches, False),
        "uncertainty by hand": lambda: _timed(_by_hand, batches, True),
        "fit equal": lambda: _timed(_by_fit, batches, "equal"),
        "fit uncertainty": lambda: _timed(_by_fit, batches, "uncertainty"),
    }
    if find_spec("torchjd") is None:
        skipped("UPGrad and PCGrad: torchjd is not installed; run: pip install 'prunus[gradients]'")
    else:
        for method in ("upgrad", "pcgrad"):
            contestants[f"fit {method}"] = partial(_timed, _by_fit, batches, method)
            contestants[f"torchjd {method}"] = partial(_timed, _by_torchjd, batches, method)
    timings = interleaved(contestants, config.repeats)
    seconds = {name: timing.median["epoch"] / config.steps for name, timing in timings.items()}
    ratios = {"uncertainty": seconds["fit uncertainty"] / seconds["uncertainty by hand"]}
    for method in ("upgrad", "pcgrad"):
        if f"fit {method}" in seconds:
            ratios[f"{method} over plain sum"] = seconds[f"fit {method}"] / seconds["fit equal"]
            ratios[f"torchjd's {method} over plain sum"] = seconds[f"torchjd {method}"] / seconds["sum by hand"]
    settings = {name: value for name, value in vars(config).items() if name != "output"} | {"tasks": len(CLASSES)}
    results = {"settings": settings, "seconds_per_step": seconds, "ratios": ratios}
    write_results(config.output, arguments, results, ["torchjd"])
    table = Table(title=f"CPU time of a step, T = {len(CLASSES)}")
    for column in ("", "ms", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in seconds.items():
        table.add_row(name, f"{1e3 * value:.2f}")
    for name, ratio in ratios.items():
        table.add_row(name, "", f"{ratio:.3f}")
    wide_console().print(table)
    return 0


def network() -> HardShared:
    """Four convolutions and a head per task, the same at every call."""
    torch.manual_seed(0)
    trunk = nn.Sequential(
        layers.ConvBNAct(3, 32, 3),
        layers.ConvBNAct(32, 32, 3, stride=2),
        layers.ConvBNAct(32, WIDTH, 3),
        layers.ConvBNAct(WIDTH, WIDTH, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return HardShared(trunk, {name: nn.Linear(WIDTH, number) for name, number in CLASSES.items()})


def _batches(steps: int, batch_size: int, image_size: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(batch_size, 3, image_size, image_size, generator=generator),
            {name: torch.randint(number, (batch_size,), generator=generator) for name, number in CLASSES.items()},
        )
        for _ in range(steps)
    ]


def _timed(train: Callable[..., None], batches: Batches, how: object) -> Stages:
    model = network()
    start = time.process_time()
    train(model, batches, how)
    return {"epoch": time.process_time() - start}


def _by_fit(model: HardShared, batches: Batches, weighting: str) -> None:
    tasks = [Task.classification(name) for name in CLASSES]
    options = FitOptions(device="cpu", progress=False, precision="fp32", channels_last="off", schedule="constant")
    fit(model, tasks, batches, 1, weighting=weighting, options=options)


def _by_hand(model: HardShared, batches: Batches, uncertainty: bool) -> None:
    variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in CLASSES})
    optimizer = torch.optim.SGD(_groups(model, variances), lr=0.05, momentum=0.9, nesterov=True)
    right = dict.fromkeys(CLASSES, 0)
    sums = dict.fromkeys(CLASSES, 0.0)
    model.train()
    for inputs, targets in batches:
        outputs = model(inputs)
        losses = {name: F.cross_entropy(outputs[name], targets[name]) for name in CLASSES}
        if uncertainty:
            total = sum(torch.exp(-variances[name]) * loss + variances[name] / 2 for name, loss in losses.items())
        else:
            total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        for name, loss in losses.items():
            sums[name] += loss.item()
            right[name] += int((outputs[name].argmax(1) == targets[name]).sum())


def _by_torchjd(model: HardShared, batches: Batches, method: str) -> None:
    from torchjd import aggregation
    from torchjd.autojac import jac_to_grad, mtl_backward

    aggregator = {"upgrad": aggregation.UPGrad, "pcgrad": aggregation.PCGrad}[method]()
    optimizer = torch.optim.SGD(_groups(model, nn.ParameterDict()), lr=0.05, momentum=0.9, nesterov=True)
    assert model.trunk is not None
    model.train()
    for inputs, targets in batches:
        features = model.trunk(inputs)
        losses = [F.cross_entropy(model.heads[name](features), targets[name]) for name in CLASSES]
        optimizer.zero_grad()
        mtl_backward(losses, features=features)
        jac_to_grad(model.trunk.parameters(), aggregator)
        optimizer.step()


def _groups(model: nn.Module, variances: nn.Module) -> list[dict[str, object]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 5e-4},
        {"params": [*(p for p in parameters if p.dim() <= 1), *variances.parameters()], "weight_decay": 0.0},
    ]


if __name__ == "__main__":
    sys.exit(main())
