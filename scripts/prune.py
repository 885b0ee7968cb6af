"""``prunus prune``: a trained checkpoint goes in, a smaller one comes out, with the curve of what each round cost."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import compress
from compress.checkpoint import load_state_dict, read_state_dict
from compress.criteria import needs, resolve
from compress.errors import first_line
from compress.loop import RunResult
from compress.report import RoundRecord
from compress.rounds import RoundContext
from compress.schedule import kept_fraction
from compress.seeding import seed_everything
from mtl import Distillation, FitOptions, Task, evaluate, fit
from mtl.data import ImageData
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
    wanted = needs(resolve(criterion))
    # How often a channel is used must be asked on images that the model was not trained on.
    split = config.calibration or ("validation" if wanted else "train")
    on_data = bool(wanted) or config.recover
    data = open_data(
        config.data,
        mean=config.mean,
        std=config.std,
        image_size=config.image_size,
        validation=0.1 if on_data and split == "validation" else 0.0,
    )
    model, example = model_and_example(config, data)
    folder, stop = Path(config.folder), None if config.max_drop is None else compress.StopRule(config.max_drop)
    options: dict[str, Any] = {"budget": config.budget, "criterion": criterion, "scope": config.scope}
    options["round_to"] = config.round_to
    if on_data:
        size = GRADIENT_BATCH_SIZE if "gradients" in wanted else CALIBRATION_BATCH_SIZE
        limit = size * config.calibration_batches
        batches = data.loader(split, batch_size=size, shuffle=False, augment=False, limit=limit, seed=config.seed)
        options |= {"calibration": batches, "recover": config.recover}
    if not (folder / CONFIG_FILE).exists():  # what cannot work fails before anything is written
        kept_fraction(config.schedule, config.budget.fraction, 0, config.rounds)
        compress.prune(model, example, seed=config.seed, **options)
    claim_folder(folder, config)
    if config.checkpoint is None:
        _train(config, data, model, RoundContext(0, folder / "dense", config.seed))
    teacher = Distillation(teacher=model, weight=config.distill, temperature=TEMPERATURE) if config.distill else None
    records: list[RoundRecord] = []

    def on_round(record: RoundRecord) -> None:
        records.append(record)
        print_round(record, records[0], config.rounds)

    result = compress.iterate(
        model,
        example,
        train=lambda pruned, context: _train(config, data, pruned, context, teacher),
        evaluate=lambda pruned: evaluate(pruned, TASK, data.loader("test", batch_size=TEST_BATCH_SIZE))[TASK.name],
        rounds=config.rounds,
        schedule=config.schedule,
        stop=stop,
        folder=folder,
        seed=config.seed,
        on_round=on_round,
        **options,
    )
    print_before_after(result)
    print(f"in {folder}: small.safetensors, history.json, history.csv, curve.png, {CONFIG_FILE}")
    print(f"curves: tensorboard --logdir {folder}")
    return result


def model_and_example(config: ModelConfig, data: ImageData) -> tuple[nn.Module, Tensor]:
    """The model with its checkpoint, and the data's first image (1, C, H, W), both on the device."""
    device = _device(config.device)
    seed_everything(config.seed)
    model = build_model(config.model, data.num_classes)
    if config.checkpoint is not None:
        load_state_dict(model, read_state_dict(config.checkpoint), source=config.checkpoint)
    example = next(iter(data.loader("train", batch_size=1, shuffle=False, augment=False)))[0].to(device)
    _check_fit(model.to(device), example, data, config)
    return model, example


def _train(
    config: PruneConfig, data: ImageData, model: nn.Module, context: RoundContext, teacher: Distillation | None = None
) -> None:
    """A round of retraining, or (round 0) the dense model from scratch."""
    loader = data.loader("train", batch_size=config.batch_size, seed=context.seed)
    epochs, lr = (config.epochs, config.lr) if context.round > 0 else (config.dense_epochs, None)
    options = FitOptions(lr=lr, seed=context.seed, device=str(_device(config.device)))
    fit(model, TASK, loader, epochs=epochs, folder=context.folder, options=options, distillation=teacher)


def _device(name: str) -> torch.device:
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
