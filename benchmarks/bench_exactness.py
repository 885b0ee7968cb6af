"""Whether pruned models compute exactly what their masked twins compute, at half of the MACs, in float64.

Claims, for each model: the plan is exact; the largest difference between ``compress.apply`` and ``compress.mask`` is at
most 1e-5 x max(1, output scale); MACs by ``torch.utils.flop_counter`` are in (0.42, 0.50] of the dense model's. The
exit status is 1 where one of them fails.

Weights are random. Batch norms get random factors and offsets and the statistics of random data: fresh ones would be
zero exactly where a mistake has to show. "mask effect" is how far the masked twin is from the dense model: far more
than the error, or there would be nothing to be exact about.
"""

import copy
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import compress
from benchmarks.common import parser, wide_console, write_results
from compress.recover import reestimate_batch_norm
from scripts.sources import build_model

MODELS = (
    "layers:resnet20_cifar", "layers:resnet56_cifar", "layers:vgg16_bn_cifar",
    "torchvision:resnet18", "torchvision:resnet50", "torchvision:vgg11_bn", "torchvision:densenet121",
    "torchvision:mobilenet_v2", "torchvision:squeezenet1_1", "torchvision:googlenet", "torchvision:efficientnet_b0",
    "torchvision:regnet_y_400mf", "torchvision:shufflenet_v2_x1_0",
)  # fmt: skip
TOLERANCE = 1e-5  # of max(1, output scale)
LOWEST_KEPT = 0.42  # far below the budget would be too much removed
CIFAR, IMAGENET = (32, 10), (224, 1000)  # pixels a side, classes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0 if all models pass, else 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = parser(__file__, "exactness of pruning to half of the MACs, in float64")
    flags.add_argument("--models", nargs="+", default=list(MODELS), help="SOURCE:NAME, as for prunus prune")
    flags.add_argument("--image-size", type=int, help="default: 32 for layers:, 224 for others")
    flags.add_argument("--macs", type=float, default=0.5, help="fraction to keep")
    config = flags.parse_args(arguments)
    torch.set_num_threads(1)
    results = []
    for name in config.models:
        size, num_classes = CIFAR if name.startswith("layers:") else IMAGENET
        results.append({"model": name, **_examine(name, config.image_size or size, num_classes, config.macs)})
        print(f"{name}: {results[-1]['failure'] or 'passed'}", file=sys.stderr, flush=True)
    _print(results)
    write_results(config.output, arguments, {"settings": {"macs": config.macs}, "results": results})
    return int(any(result["failure"] for result in results))


def _examine(name: str, image_size: int, num_classes: int, fraction: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model = build_model(name, num_classes).eval()
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    images = torch.randn(4, channels, image_size, image_size)
    _randomize_norms(model, images)
    example = images[:1]
    start = time.perf_counter()
    try:
        result = compress.prune(model, example, budget=compress.Budget(macs=fraction))
    except compress.PruneError as problem:
        return {"failure": str(problem)}
    seconds = time.perf_counter() - start
    kept = _count_macs(result.model, example) / _count_macs(model, example)

    double, inputs = copy.deepcopy(model).double(), images.double()
    expected = _run(compress.mask(double, result.plan), inputs)
    found = _run(compress.apply(double, result.plan), inputs)
    dense = _run(double, inputs)
    error, tolerance = _largest(found - expected), TOLERANCE * max(1.0, _largest(dense))
    failures = {
        "the plan is not exact": not result.plan.exact,
        f"error {error:.2g} is above {tolerance:.2g}": not error <= tolerance,
        f"MACs {kept:.4f} are not in ({LOWEST_KEPT}, {fraction}]": not min(LOWEST_KEPT, fraction) < kept <= fraction,
    }
    return {
        "failure": "; ".join(reason for reason, failed in failures.items() if failed),
        "exact": result.plan.exact,
        "max_abs_error": error,
        "tolerance": tolerance,
        "mask_effect": _largest(expected - dense),
        "output_scale": _largest(dense),
        "macs_kept": kept,
        "params_kept": result.after.params / result.before.params,
        "prune_seconds": seconds,
        "notes": list(result.notes),
    }


def _randomize_norms(model: nn.Module, images: Tensor) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    reestimate_batch_norm(model, [images])


def _count_macs(model: nn.Module, example: Tensor) -> int:
    # with gradients: the counter's module tracker asserts under no_grad for some models
    with FlopCounterMode(display=False) as counter:
        model.eval()(example)
    return counter.get_total_flops() // 2


def _run(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.eval()(inputs)
    return output


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _print(results: Sequence[dict[str, Any]]) -> None:
    table = Table(title="pruned to a MACs budget, float64, against the masked twin", title_justify="left")
    for column in ("model", "max error", "tolerance", "mask effect", "MACs", "params", "seconds", ""):
        table.add_column(column, justify="left" if column in ("model", "") else "right")
    for result in results:
        if "exact" in result:
            numbers = [f"{result[key]:.1e}" for key in ("max_abs_error", "tolerance", "mask_effect")]
            numbers += [f"{result[key]:.2%}" for key in ("macs_kept", "params_kept")]
            numbers.append(f"{result['prune_seconds']:.2f}")
        else:
            numbers = ["-"] * 6
        table.add_row(result["model"], *numbers, result["failure"] or "passed")
    wide_console().print(table)


if __name__ == "__main__":
    sys.exit(main())
