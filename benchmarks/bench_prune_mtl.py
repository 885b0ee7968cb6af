"""Pruning what tasks share: is the worst task spared, and what is left of a soft-shared stack?

Claims. ``balanced``: one trunk for the eight alphabets of Omniglot, with a head for each, at 3 x fewer MACs and without
retraining: the accuracy that the worst task loses is at most 0.7 of what it loses when one criterion judges all tasks
mixed, mean over seeds. Both prune by ``reconstruction`` and recover, from the same training drawings without labels.
The archives of Omniglot are no part of prunus: name their folder by --data; without it this part is left out.

``stack``: networks for five questions about digits, trained with the trace norm, collapsed and then pruned without
training, are within a point of the uncollapsed stack at 35 % of its parameters.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import compress
import layers
from benchmarks.bench_soft_sharing import DIGIT_TASKS, digits_loader, trained_stack
from benchmarks.common import parser, skipped, wide_console, write_results
from compress.tasks import ByTask
from mtl import FitOptions, HardShared, Task, TraceNorm, evaluate, fit
from mtl.data import MISSING_CLASS, TaskData, TensorLoader, digits, loaders, num_outputs, omniglot

WIDTHS = (8, 16, 32)
ARMS: dict[str, str | None] = {"mixed": None, "mean": "mean", "balanced": "balanced"}
DRAWINGS = 8  # of a character to train on; the other 12 are for the test


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; exit status 0, also where the data of one are not there."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = parser(__file__, "accuracy of the tasks of pruned multi-task models")
    flags.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    flags.add_argument("--data", type=Path, help="folder with images_background_small1.zip and ..._small2.zip")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--jobs", type=int, default=1, help="seeds at the same time, each in a process of one thread")
    flags.add_argument("--epochs", type=int, default=15, help="of the hard-shared model")
    flags.add_argument("--macs", type=float, default=1 / 3, help="that are kept of the hard-shared model")
    flags.add_argument("--stack-epochs", type=int, default=8)
    flags.add_argument("--strength", type=float, default=1.5, help="of the trace norm")
    flags.add_argument("--energy", type=float, default=0.99, help="of the collapse")
    flags.add_argument("--params", type=float, default=0.35, help="that are kept of the stack")
    config = flags.parse_args(arguments)
    torch.set_num_threads(1)
    results = {}
    for part in config.parts:
        if part == "balanced" and config.data is None:
            skipped(f"{Path(__file__).name} needs --data FOLDER with the archives of Omniglot for 'balanced'")
            continue
        with ProcessPoolExecutor(config.jobs, get_context("fork")) as pool:
            found = pool.map(PARTS[part], [config] * config.seeds, range(config.seeds))
            runs = [run for runs in found for run in runs]
        results[part] = {**SUMMARIES[part](runs), "runs": runs}
    settings = {name: value for name, value in vars(config).items() if name not in ("output", "data")}
    if results:
        write_results(config.output, arguments, {"settings": settings, **results})
        _print(results)
    return 0


def _balanced(config: Any, seed: int) -> list[dict[str, Any]]:
    """Every arm on one trained model."""
    data = omniglot(config.data, train=DRAWINGS, validation=0, seed=seed)
    tasks = [Task.classification(name) for name in data]
    model = _hard_shared(data, tasks, config.epochs, seed)
    own = {name: [(images, None) for images, _ in part] for name, part in loaders(data, "train", batch_size=64).items()}
    test = loaders(data, "test", batch_size=500)
    dense = evaluate(model, tasks, test)
    runs = []
    for arm, combine in ARMS.items():
        start = time.process_time()
        result = compress.prune(
            model,
            torch.zeros(1, 1, 28, 28),
            budget=compress.Budget(macs=config.macs),
            criterion="reconstruction",
            combine=combine,
            calibration=own if combine else list(ByTask(own)),
            recover=True,
        )
        after = evaluate(result.model, tasks, test)
        runs.append({
            "seed": seed,
            "arm": arm,
            "macs_kept": result.after.macs / result.before.macs,
            "drops": {name: dense[name] - after[name] for name in dense},
            "worst_drop": max(dense[name] - after[name] for name in dense),
            "mean_drop": mean(dense[name] - after[name] for name in dense),
            "dense": dense,
            "task_losses": dict(result.task_losses),
            "cpu_seconds": round(time.process_time() - start, 1),
        })  # fmt: skip
        print({name: value for name, value in runs[-1].items() if name != "dense"}, file=sys.stderr, flush=True)
    return runs


def _hard_shared(data: Mapping[str, TaskData], tasks: Sequence[Task], epochs: int, seed: int) -> nn.Module:
    """Trained on batches with drawings of all alphabets: batch norm then sees them mixed, as its averages do."""
    inputs = torch.cat([_tensor(own.train.inputs) for own in data.values()])
    sizes = [len(own.train) for own in data.values()]
    targets, start = {}, 0
    for (name, own), size in zip(data.items(), sizes, strict=True):
        targets[name] = torch.full((len(inputs),), MISSING_CLASS)
        targets[name][start : start + size] = own.train.targets[name]
        start += size
    torch.manual_seed(seed)
    blocks: list[nn.Module] = []
    for before, width in zip((1, *WIDTHS), WIDTHS, strict=False):
        blocks += [layers.ConvBNAct(before, width, 3), nn.MaxPool2d(2)]
    heads = {name: nn.Linear(9 * WIDTHS[-1], number) for name, number in num_outputs(data).items()}
    model = HardShared(nn.Sequential(*blocks, nn.Flatten()), heads)
    loader = TensorLoader(inputs, targets, batch_size=128, shuffle=True, seed=seed)
    options = FitOptions(optimizer="adamw", lr=3e-3, weight_decay=0.05, seed=seed, device="cpu", progress=False)
    fit(model, tasks, loader, epochs=epochs, options=options)
    return model.eval()


def _tensor(inputs: Any) -> Tensor:
    assert isinstance(inputs, Tensor)
    return inputs


def _stack(config: Any, seed: int) -> list[dict[str, Any]]:
    """Accuracy of a trained stack, of what it collapses to, and of that after pruning."""
    coupling = TraceNorm(config.strength, of="deviations", proximal=True)
    model, _ = trained_stack(seed, config.stack_epochs, coupling)
    data = digits()
    example = _tensor(data.test.images)[:1]
    size = compress.measure(model, example).params
    small = model.collapse(energy=config.energy)
    kept = compress.measure(small, example).params / size
    result = compress.prune(
        small,
        example,
        budget=compress.Budget(params=min(1.0, config.params / kept)),
        criterion="taylor",
        combine="balanced",
        calibration=list(digits_loader(data.train, shuffle=True)),
        loss=nn.CrossEntropyLoss(),
        recover=["last_layer", "batch_norm"],
    )
    accuracy = {
        name: mean(evaluate(each, DIGIT_TASKS, digits_loader(data.test)).values())
        for name, each in {"stack": model, "collapsed": small, "pruned": result.model}.items()
    }
    run = {"seed": seed, **accuracy, "collapsed_params": kept, "pruned_params": result.after.params / size}
    print(run, file=sys.stderr, flush=True)
    return [run]


def _spared(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    worst = {arm: mean(run["worst_drop"] for run in runs if run["arm"] == arm) for arm in ARMS}
    average = {arm: mean(run["mean_drop"] for run in runs if run["arm"] == arm) for arm in ARMS}
    # (untrained models lose nothing)
    ratios = {arm: worst[arm] / worst["mixed"] if worst["mixed"] > 0 else None for arm in ARMS}
    claim = "balanced: at most 0.7 of the mixed criterion's worst drop"
    return {
        "worst_drop": worst,
        "mean_drop": average,
        "ratio": ratios,
        "claim": claim,
        "met": ratios["balanced"] is not None and ratios["balanced"] <= 0.7,
    }


def _left(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    drop = max(run["stack"] - run["pruned"] for run in runs)
    kept = max(run["pruned_params"] for run in runs)
    claim = "at most 0.35 of the parameters, at most 0.01 less accuracy"
    return {"largest_drop": drop, "largest_part": kept, "claim": claim, "met": drop <= 0.01 and kept <= 0.35}


PARTS: dict[str, Callable[[Any, int], list[dict[str, Any]]]] = {"balanced": _balanced, "stack": _stack}
SUMMARIES: dict[str, Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]] = {"balanced": _spared, "stack": _left}


def _print(results: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("part", "measured", "value")
    for part, found in results.items():
        for name, value in found.items():
            if name != "runs":
                table.add_row(part, name, str(value))
    wide_console().print(table)


if __name__ == "__main__":
    sys.exit(main())
