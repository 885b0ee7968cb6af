"""What pruning costs in accuracy where nothing is trained: a few unlabelled images, one CPU, minutes.

Claim: ResNet-56 (93.39 % on CIFAR-10) keeps 92.3 % at 2.0 x fewer MACs and 90.3 % at 2.57 x, ResNet-20 (91.73 %) keeps
89.8 % at 1.67 x and 87.5 % at 2.0 x. Neither the checkpoints nor the images are part of prunus: name them by flags.

Every criterion gets the same calibration images and the same recovery; Torch-Pruning gets batch norms re-estimated on
them. Labels are used for nothing but the accuracy on the test images.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import compress
from benchmarks.common import checkpoint_parser, parse_checkpoint, skipped, trained_model, wide_console, write_results
from benchmarks.peer import prune_to_macs
from compress.criteria import CRITERIA, needs
from compress.recover import reestimate_batch_norm
from mtl.data import ImageData
from scripts.sources import open_data

TEST_BATCH_SIZE = 500


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0, also where it has nothing to run on, and 2 for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = checkpoint_parser(__file__, "accuracy of checkpoints that were pruned without any training")
    flags.add_argument("--criterion", nargs="+", default=sorted(CRITERIA), help="criteria to compare")
    flags.add_argument("--seed", type=int, default=0)
    config = flags.parse_args(arguments)
    if not config.checkpoint or config.data is None:
        return skipped(f"{Path(__file__).name} needs --checkpoint layers:resnet20_cifar=FILE@0.5 and --data ...")
    try:
        data = open_data(config.data, mean=config.mean, std=config.std, image_size=None, validation=0.0)
        rows = [row for text in config.checkpoint for row in _rows(text, data, config)]
    except (ValueError, OSError) as error:
        print(f"{Path(__file__).stem}: {error}", file=sys.stderr)
        return 2
    print_rows("pruned without training", rows)
    settings = {"images": config.images, "batch_size": config.batch_size, "seed": config.seed}
    write_results(config.output, arguments, {"settings": settings, "rows": rows}, ("torch-pruning",))
    return 0


def _rows(text: str, data: ImageData, config: Any) -> Iterator[dict[str, Any]]:
    """One row a way of pruning and fraction: ``layers:resnet20_cifar=FILE@0.6,0.5``."""
    source, file, fractions = parse_checkpoint(text)
    model = trained_model(source, file, data.num_classes)
    batches = calibration_images(data, config)
    dense = accuracy_on_test(model, data)
    yield {"model": source, "method": "dense", "macs_kept": 1.0, "accuracy": dense, "seconds": 0.0, "cpu_seconds": 0.0}
    for fraction in fractions:
        for name, method in _methods(model, fraction, batches, config).items():
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                pruned = method()
            except Exception as error:
                if not name.startswith("torch-pruning"):
                    raise
                yield {"model": source, "method": name, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
                continue
            seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
            kept = compress.measure(pruned, batches[0][:1]).macs / compress.measure(model, batches[0][:1]).macs
            row = {"model": source, "method": name, "budget": fraction, "macs_kept": kept}
            row |= {"accuracy": accuracy_on_test(pruned, data), "seconds": seconds, "cpu_seconds": cpu_seconds}
            print(row, file=sys.stderr)
            yield row


def _methods(
    model: nn.Module, fraction: float, batches: Sequence[Tensor], config: Any
) -> dict[str, Callable[[], nn.Module]]:
    def ours(criterion: str, recover: bool) -> nn.Module:
        budget = compress.Budget(macs=fraction)
        options: dict[str, Any] = {"calibration": batches} if recover or needs(CRITERIA[criterion]) else {}
        return compress.prune(
            model, batches[0][:1], budget=budget, criterion=criterion, recover=recover, seed=config.seed, **options
        ).model

    unlabelled = [name for name in config.criterion if "gradients" not in needs(CRITERIA[name])]
    methods: dict[str, Callable[[], nn.Module]] = {
        f"{name}, {'recovered' if recover else 'nothing else'}": partial(ours, name, recover)
        for name in unlabelled
        for recover in ((False, True) if name == "l1" else (True,))
    }
    for name in ("MagnitudeImportance", "BNScaleImportance", "LAMPImportance"):
        methods[f"torch-pruning {name}, batch norms re-estimated"] = partial(
            _torch_pruning, model, name, fraction, batches
        )
    return methods


def _torch_pruning(model: nn.Module, importance: str, fraction: float, batches: Sequence[Tensor]) -> nn.Module:
    import torch_pruning

    macs = fraction * compress.measure(model, batches[0][:1]).macs
    best = prune_to_macs(model, batches[0][:1], getattr(torch_pruning.importance, importance)(), macs)
    reestimate_batch_norm(best, batches)
    return best.eval()


def calibration_images(data: ImageData, config: Any) -> list[Tensor]:
    """Training images without labels, as they are."""
    loader = data.loader("train", batch_size=config.batch_size, shuffle=True, augment=False, seed=config.seed)
    batches: list[Tensor] = []
    for images, _ in loader:
        left = config.images - sum(map(len, batches))
        if left <= 0:
            break
        batches.append(images[:left])
    return batches


def accuracy_on_test(model: nn.Module, data: ImageData) -> float:
    """The part of all test images that is classified as labelled."""
    right = total = 0
    with torch.no_grad():
        for images, labels in data.loader("test", batch_size=TEST_BATCH_SIZE):
            right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    return right / total


def print_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """One line a way of compressing."""
    table = Table(title=title, title_justify="left")
    for column in ("model", "budget", "how", "accuracy", "MACs", "seconds", "CPU seconds"):
        table.add_column(column, justify="left" if column in ("model", "how") else "right")
    for row in rows:
        if "failed" in row:
            table.add_row(row["model"], "", row["method"], row["failed"])
            continue
        times = (f"{row[name]:.0f}" for name in ("seconds", "cpu_seconds"))
        budget = f"{row['budget']:.3g}" if "budget" in row else ""
        accuracy, macs = f"{row['accuracy']:.2%}", f"{row['macs_kept']:.1%}"
        table.add_row(row["model"], budget, row["method"], accuracy, macs, *times)
    wide_console().print(table)


if __name__ == "__main__":
    sys.exit(main())
