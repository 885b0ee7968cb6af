"""``prunus prune``: a trained checkpoint goes in, a smaller one comes out, with the curve of what each round cost."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import compress
from compress.checkpoint import load_state_dict, read_state_dict
from compress.criteria import Criterion, needs, resolve
from compress.errors import first_line
from compress.loop import RunResult
from compress.report import RoundRecord
from compress.rounds import RoundContext
from compress.schedule import kept_fraction, prepared
from compress.seeding import seed_everything
from mtl import Distillation, FitOptions, Task, evaluate, fit
from mtl.data import ImageData, TensorLoader
from scripts.command import run_command
from scripts.config import CONFIG_FILE, ModelConfig, PruneConfig, claim_folder
from scripts.sources import build_model, find_criterion, open_data
from scripts.table import print_before_after, print_round

TASK = Task("class", nn.CrossEntropyLoss())
TEMPERATURE = 4.0  # of distillation: soft enough to show the teacher's second thoughts (Hinton et al. 2015, section 3)
CALIBRATION_BATCH_SIZE = 128
GRADIENT_BATCH_SIZE = 32  # each batch is one sample of the gradient
TEST_BATCH_SIZE = 500


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(run, PruneConfig, "prunus prune", argv)


def run(config: PruneConfig) -> RunResult:
    """Prunes as ``config`` says, prints a table a round, and returns the result. Bad input is a ``ValueError``."""
    criterion = find_criterion(config.criterion)
    data = open_data(
        config.data, mean=config.mean, std=config.std, image_size=config.image_size, validation=config.validation
    )
    held_out = data.validation is not None
    if config.max_drop is not None and not held_out:
        raise ValueError("--max-drop needs validation images, since test images decide nothing: give --validation 0.1")
    model, example = model_and_example(config, data)
    folder, stop = Path(config.folder), None if config.max_drop is None else compress.StopRule(config.max_drop)
    pruning: dict[str, Any] = {"budget": config.budget, "criterion": criterion, "scope": config.scope}
    pruning |= {"round_to": config.round_to, **_calibration(config, data, criterion)}
    if not (folder / CONFIG_FILE).exists():  # what cannot work fails before anything is written
        kept_fraction(config.schedule, config.budget.fraction, 0, config.rounds)
        compress.prune(model, example, seed=config.seed, **pruning)
    claim_folder(folder, config)
    if config.checkpoint is None:
        _train(config, data, model, RoundContext(0, folder / "dense", config.seed))
    teacher = Distillation(teacher=model, weight=config.distill, temperature=TEMPERATURE) if config.distill else None
    pressed = config.sparsity > 0  # channels are pressed before the first of them go, in a round of its own
    rounds = config.rounds + pressed
    records: list[RoundRecord] = []

    def on_round(record: RoundRecord) -> None:
        records.append(record)
        print_round(record, records[0], rounds)

    def train(pruned: nn.Module, context: RoundContext) -> None:
        more = pressed and context.round < context.rounds  # after the last round nothing is removed
        penalty = compress.GroupLasso(compress.trace(pruned, example), config.sparsity) if more else None
        _train(config, data, pruned, context, distillation=teacher, penalty=penalty)

    def accuracy(pruned: nn.Module, split: str) -> float:
        return evaluate(pruned, TASK, data.loader(split, batch_size=TEST_BATCH_SIZE))[TASK.name]

    result = compress.iterate(
        model,
        example,
        train=train,
        evaluate=lambda pruned: accuracy(pruned, "validation" if held_out else "test"),
        test=(lambda pruned: accuracy(pruned, "test")) if held_out else None,
        rounds=rounds,
        schedule=prepared(config.schedule, config.rounds) if pressed else config.schedule,
        stop=stop,
        folder=folder,
        seed=config.seed,
        on_round=on_round,
        **pruning,
    )
    print_before_after(result)
    print(f"in {folder}: small.safetensors, history.json, history.csv, curve.png, {CONFIG_FILE}")
    print(f"curves: tensorboard --logdir {folder}")
    return result


def model_and_example(config: ModelConfig, data: ImageData) -> tuple[nn.Module, Tensor]:
    """The model with its checkpoint, and the data's first image (1, C, H, W), both on the device."""
    device = device_named(config.device)
    seed_everything(config.seed)
    model = build_model(config.model, data.num_classes)
    if config.checkpoint is not None:
        load_state_dict(model, read_state_dict(config.checkpoint), source=config.checkpoint)
    example = next(iter(data.loader("train", batch_size=1, shuffle=False, augment=False)))[0].to(device)
    _check_fit(model.to(device), example, data, config)
    return model, example


def _calibration(config: PruneConfig, data: ImageData, criterion: str | Criterion) -> dict[str, Any]:
    """The images that the criterion and the recovery look at; empty where none of them does."""
    wanted = needs(resolve(criterion))
    if not wanted and not config.recover:
        return {}
    # How often a channel is used must be asked on images that the model was not trained on.
    split = config.calibration or ("validation" if wanted and data.validation is not None else "train")
    size = GRADIENT_BATCH_SIZE if "gradients" in wanted else CALIBRATION_BATCH_SIZE
    batches = calibration_loader(data, split, size, config.calibration_batches, seed=config.seed)
    return {"calibration": batches, "recover": config.recover}


def calibration_loader(data: ImageData, split: str, batch_size: int, num_batches: int, *, seed: int) -> TensorLoader:
    """At most so many batches of a split as they are, drawn by the seed."""
    limit = batch_size * num_batches
    return data.loader(split, batch_size=batch_size, shuffle=False, augment=False, limit=limit, seed=seed)


def _train(config: PruneConfig, data: ImageData, model: nn.Module, context: RoundContext, **more: Any) -> None:
    """A round of retraining, or (round 0) the dense model from scratch; ``more`` goes to ``fit``."""
    loader = data.loader("train", batch_size=config.batch_size, seed=context.seed)
    dense = context.round == 0
    epochs, lr, average = (config.dense_epochs, None, None) if dense else (config.epochs, config.lr, config.ema_decay)
    options = FitOptions(lr=lr, ema_decay=average, seed=context.seed, device=str(device_named(config.device)))
    fit(model, TASK, loader, epochs=epochs, folder=context.folder, options=options, **more)


def device_named(name: str) -> torch.device:
    """The device that ``--device`` names; ``ValueError`` where it cannot be used."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise ValueError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); give auto or cpu") from error


def _check_fit(model: nn.Module, example: Tensor, data: ImageData, config: ModelConfig) -> None:
    """The model must take the data's images and give a number for each of its classes."""
    shape = tuple(example.shape[1:])
    remedy = "choose a model for such images, or other data"
    try:
        with torch.no_grad():
            output = model.eval()(example)
    except Exception as error:
        raise ValueError(
            f"{config.model} cannot run on the images {shape} of {config.data} ({first_line(error)}); {remedy}"
        ) from error
    if not isinstance(output, Tensor) or output.shape != (1, data.num_classes):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{config.model} gives {found} for an image; {config.data} has {data.num_classes} classes; {remedy}"
        )


if __name__ == "__main__":
    sys.exit(main())
