"""``prunus prune-mtl``: a model of several tasks goes in, a smaller one comes out in which every task is alive."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torchmetrics.regression import R2Score

import compress
from compress.budget import Budget
from compress.checkpoint import load_state_dict, read_state_dict
from compress.criteria import needs, resolve
from compress.loop import RunResult
from compress.report import RoundRecord
from compress.rounds import RoundContext
from compress.schedule import kept_fraction
from compress.seeding import seed_everything
from mtl import FitOptions, SoftShared, Task, evaluate, fit
from mtl.comparison import Method, standard_method
from mtl.data import loaders
from scripts.command import run_command
from scripts.config import CONFIG_FILE, PRUNE_OUTPUTS, check_at_least, claim_folder
from scripts.prune import CALIBRATION_BATCH_SIZE, GRADIENT_BATCH_SIZE, TEST_BATCH_SIZE, device_named
from scripts.sources import find_criterion
from scripts.table import print_before_after, print_round
from scripts.task_sources import Data, builders, has_validation, open_config, tasks_of

SMALL = "small.safetensors"


@dataclass(frozen=True, kw_only=True)
class PruneMtlConfig:
    """Prune a model of several tasks to a budget such that no task is sacrificed; the same command resumes.

    Args:
        data: of the tasks, as for prunus train-mtl
        budget: what fraction of the dense model to keep: one of --budget.macs .params .channels .latency, in (0, 1]
        method: how the tasks share, as for prunus train-mtl: hard, hard:WEIGHTING, "private norms", "first layers"
            (:NUMBER), soft:l2 or soft:trace_norm (:STRENGTH)
        checkpoint: weights to start from (.pt .pth .th .safetensors); without, the model is trained first
        collapse: of a soft-shared model: before pruning, keep this part of the differences between tasks, in (0, 1]
        trunk: layers:NAME, torchvision:NAME, timm:NAME or FILE.py:FACTORY; default: by the data
        width: outputs of the trunk, which the heads read
        targets: columns of csv to predict, one task each
        features: columns of csv to predict from; default: all others
        classes: targets of csv whose numbers are classes
        shots: images of each character of omniglot to train on
        image_size: pixels a side, for image folders whose images differ in size
        criterion: which channels go, as for prunus prune
        combine: balanced keeps the loss of the worst task small; mean, max
        calibration_batches: how many batches of training data, of each task, criteria and --recover look at
        recover: repair each pruned model without training
        scope: "global" compares channels over layers, "uniform" takes the same part of each
        schedule: one_shot, linear, cubic or exponential
        rounds: of pruning and training
        epochs: of training in each round; 0 for none
        dense_epochs: epochs of training the dense model, where there is no checkpoint
        batch_size: samples a step and data set
        lr: peak learning rate of retraining
        max_drop: stop at the first round in which a task loses more validation accuracy than this fraction, and return
            the one before
        seed: of everything random
        device: auto, cpu, cuda, ...
        folder: of this run: results, curves and what a resume needs
    """

    data: str
    budget: Budget
    method: str = "hard"
    checkpoint: str | None = None
    collapse: float | None = None
    trunk: str | None = None
    width: int = 64
    targets: list[str] | None = None
    features: list[str] | None = None
    classes: list[str] | None = None
    shots: int = 10
    image_size: int | None = None
    criterion: str = "taylor"
    combine: Literal["balanced", "mean", "max"] = "balanced"
    calibration_batches: int = 8
    recover: bool = False
    scope: str = "global"
    schedule: str = "cubic"
    rounds: int = 1
    epochs: int = 2
    dense_epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    max_drop: float | None = None
    seed: int = 0
    device: str = "auto"
    folder: str = "runs/prune-mtl"

    def __post_init__(self) -> None:
        check_at_least(self, 1, "width", "shots", "rounds", "dense_epochs", "batch_size", "calibration_batches")
        if self.epochs < 0:
            raise ValueError(f"--epochs is {self.epochs}, but it must be 0 or more")
        if self.collapse is not None and not self.method.startswith("soft"):
            raise ValueError(f"--collapse is for soft sharing, and --method is {self.method}")
        FitOptions(lr=self.lr)  # bad values fail here, before anything is written


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(run, PruneMtlConfig, "prunus prune-mtl", argv)


def run(config: PruneMtlConfig) -> RunResult:
    """Prunes as ``config`` says, prints a table a round, and returns the result. Bad input is a ``ValueError``."""
    criterion = find_criterion(config.criterion)
    data = open_config(config)
    held_out = has_validation(data)
    if config.max_drop is not None and not held_out:
        raise ValueError("--max-drop needs validation data, since test data decide nothing, and there are none here")
    tasks = [_higher_is_better(task) for task in tasks_of(data)]
    device, folder = device_named(config.device), Path(config.folder)
    model = _model(config, data, tasks).to(device)
    example = _first_batch(loaders(data, "test", batch_size=1)).to(device)
    pruning: dict[str, Any] = {"budget": config.budget, "criterion": criterion, "scope": config.scope}
    pruning |= {"combine": config.combine, "recover": config.recover}
    pruning |= {"loss": {task.name: _loss_of(task) for task in tasks}}
    pruning |= {"calibration": _calibration(config, data, gradients="gradients" in needs(resolve(criterion)))}
    stop = None if config.max_drop is None else compress.StopRule(config.max_drop)
    if not (folder / CONFIG_FILE).exists():  # what cannot work fails before anything is written
        kept_fraction(config.schedule, config.budget.fraction, 0, config.rounds)
        compress.prune(_collapsed(config, model), example, seed=config.seed, **pruning)
    claim_folder(folder, config, PRUNE_OUTPUTS)

    def train(
        model: nn.Module, context: RoundContext, epochs: int = config.epochs, lr: float | None = config.lr
    ) -> None:
        if epochs:
            options = FitOptions(optimizer="adamw", lr=lr, seed=context.seed, device=str(device))
            weighting = _method(config, data).weighting  # a new one: some have a state
            batches = loaders(data, "train", batch_size=config.batch_size, seed=context.seed)
            fit(model, tasks, batches, epochs, weighting=weighting, folder=context.folder, options=options)

    def metrics(model: nn.Module, split: str) -> dict[str, float]:
        return evaluate(model, tasks, loaders(data, split, batch_size=TEST_BATCH_SIZE))

    if config.checkpoint is None:
        train(model, RoundContext(0, folder / "dense", config.seed), config.dense_epochs, None)
    records: list[RoundRecord] = []

    def on_round(record: RoundRecord) -> None:
        records.append(record)
        print_round(record, records[0], config.rounds)

    result = compress.iterate(
        _collapsed(config, model),
        example,
        train=train,
        evaluate=lambda pruned: metrics(pruned, "validation" if held_out else "test"),
        test=(lambda pruned: metrics(pruned, "test")) if held_out else None,
        rounds=config.rounds,
        schedule=config.schedule,
        stop=stop,
        folder=folder,
        seed=config.seed,
        on_round=on_round,
        **pruning,
    )
    compress.save(result, folder / SMALL)  # for a fresh model: what was collapsed is so by the same file
    print_before_after(result)
    print(f"in {folder}: {SMALL}, history.json, history.csv, curve.png, {CONFIG_FILE}")
    print(f"curves: tensorboard --logdir {folder}")
    return result


def _method(config: PruneMtlConfig, data: Data) -> Method:
    method = standard_method(config.method, *builders(data, config.trunk, config.width))
    if method.apart or method.then is not None:
        raise ValueError(
            f"--method is {config.method}, which shares nothing: give hard, private norms, first layers or soft:..."
        )
    return method


def _model(config: PruneMtlConfig, data: Data, tasks: Sequence[Task]) -> nn.Module:
    method = _method(config, data)
    seed_everything(config.seed)
    model = method.build(tasks)
    if config.checkpoint is not None:
        load_state_dict(model, read_state_dict(config.checkpoint), source=config.checkpoint)
    return model


def _collapsed(config: PruneMtlConfig, model: nn.Module) -> nn.Module:
    if config.collapse is None:
        return model
    assert isinstance(model, SoftShared)
    return model.collapse(energy=config.collapse)


def _higher_is_better(task: Task) -> Task:
    """Numbers are judged by the part of their variance that is explained: like an accuracy, more is better."""
    return task if task.direction == "max" else replace(task, metric=R2Score(), direction="max")


def _loss_of(task: Task) -> Any:
    """The task's loss on outputs and targets, of which some may be missing."""
    return lambda output, target: task.loss(*task.pair(output, task.labels(target)))


def _calibration(config: PruneMtlConfig, data: Data, *, gradients: bool) -> Any:
    """Some training batches, drawn by the seed: of each task where it has data of its own."""
    size = GRADIENT_BATCH_SIZE if gradients else CALIBRATION_BATCH_SIZE
    found = loaders(data, "train", batch_size=size, seed=config.seed)
    if isinstance(found, Mapping):
        return {task: list(islice(own, config.calibration_batches)) for task, own in found.items()}
    return list(islice(found, config.calibration_batches))


def _first_batch(found: Any) -> Tensor:
    inputs: Tensor = next(iter(next(iter(found.values())) if isinstance(found, Mapping) else found))[0]
    return inputs


if __name__ == "__main__":
    sys.exit(main())
