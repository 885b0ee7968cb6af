"""What pruning costs in accuracy with a small training budget: ours beside Torch-Pruning, the same trainer for both.

Claim: ResNet-20 (91.73 % on CIFAR-10) at 2.0 x fewer MACs after 10 epochs in all: at least 91.2 %, and a point above
the best of Torch-Pruning. Neither the checkpoint nor the images are part of prunus: name them by flags.

Ours: all channels go at once by ``reconstruction`` with recovery, since a repaired model needs no rounds; every epoch
then goes into one cosine, with the dense model as a teacher; of the channels between the stages too, if
``--feature-weight`` says so (for ResNet-20 that changed nothing: 90.5 % with, 90.6 % without, seed 0). ``shrink`` is
the same with ``compress.shrink``. The peer prunes in steps of MACs with an epoch of training after each, and has what
is left of the epochs after the last.
Batches, augmentation, optimiser, learning rate and schedule are the same for all. ``METHOD+distill`` gives the peer our
teacher of the outputs too: what the pruning alone is worth.

The accuracy is that of the last epoch on the test images, which are read once, at the end. Choices were made with
``--validation``, which holds images out of the training part and never reads the test images.
"""

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from torch import nn

import compress
from benchmarks.common import checkpoint_parser, parse_checkpoint, skipped, trained_model, wide_console, write_results
from benchmarks.peer import prune_to_macs
from compress.folder import write_file
from compress.seeding import seed_everything
from mtl import Distillation, FitOptions, Task, evaluate, fit
from mtl.batch import move
from mtl.data import ImageData
from mtl.placement import Placement
from scripts.sources import open_data

TASK = Task("class", nn.CrossEntropyLoss())
IMPORTANCES = {"l1": "MagnitudeImportance", "bn_scale": "BNScaleImportance", "taylor": "TaylorImportance"}
OURS = ("ours", "shrink")
METHODS = (*OURS, *IMPORTANCES, *(f"{name}+distill" for name in IMPORTANCES))
GRADIENT_IMAGES = 1024  # for the peer's Taylor importance
EVALUATION_BATCH_SIZE = 500
RESULT = "result.json"
DRY_BATCHES = 3  # of a dry run: enough to go through every line
DEFAULTS: dict[str, Any] = {
    "epochs": 10, "lr": 0.02, "distill": 0.9, "temperature": 4.0, "feature_weight": 0.0, "weight_decay": 5e-4,
    "peer_rounds": 5,
    "methods": ["ours", *IMPORTANCES], "seeds": [0, 1, 2],
}  # fmt: skip


def main(argv: Sequence[str] | None = None, file: str = __file__, defaults: Mapping[str, Any] = DEFAULTS) -> int:
    """Run the benchmark; exit status 0, also where it has nothing to run on, and 2 for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = checkpoint_parser(file, "accuracy of pruned checkpoints after a budget of training, beside Torch-Pruning")
    flags.add_argument("--methods", nargs="+", choices=METHODS, help="in the order in which they run")
    flags.add_argument("--seeds", type=int, nargs="+")
    flags.add_argument("--epochs", type=int, help="in all, over all rounds")
    flags.add_argument("--lr", type=float, help="peak")
    flags.add_argument("--weight-decay", type=float)
    flags.add_argument("--distill", type=float, help="part of the loss that the dense model's outputs have")
    flags.add_argument("--temperature", type=float, help="of the distillation")
    flags.add_argument("--feature-weight", type=float, help="of the stages' outputs in the distillation; 0: none")
    flags.add_argument("--ema-decay", type=float, help="average of the weights, for all methods")
    flags.add_argument("--peer-rounds", type=int, help="steps in which the peer prunes")
    flags.add_argument("--validation", type=float, default=0.0, help="measure on this part of the training images")
    flags.add_argument("--device", default="auto")
    flags.add_argument("--folder", help="of the runs, to resume them; default: a temporary one")
    flags.add_argument("--dry-run", action="store_true", help="a few batches an epoch, on a few images")
    flags.set_defaults(**defaults)
    config = flags.parse_args(arguments)
    if not config.checkpoint or config.data is None:
        return skipped(f"{Path(file).name} needs --checkpoint layers:resnet20_cifar=FILE@0.5 and --data ...")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            rows = _run_all(config, Path(config.folder or temporary), arguments)
    except (ValueError, OSError) as error:
        print(f"{Path(file).stem}: {error}", file=sys.stderr)
        return 2
    _print(rows)
    return 0


def _run_all(config: Any, folder: Path, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The results of all runs, written after each."""
    if set(config.methods) - {*OURS}:
        if not 1 <= config.peer_rounds <= config.epochs:
            raise ValueError(
                f"--peer-rounds is {config.peer_rounds}, but it must be in 1 ... --epochs: an epoch after each"
            )
        if find_spec("torch_pruning") is None:
            raise ValueError("the peer's methods need Torch-Pruning: pip install -e '.[peers]', or --methods ours")
    data = open_data(config.data, mean=config.mean, std=config.std, image_size=None, validation=config.validation)
    names = (*(name for name in DEFAULTS if name != "methods"), "ema_decay", "batch_size", "images", "validation")
    settings = {name: getattr(config, name) for name in (*names, "dry_run")}
    device = Placement.choose(nn.Identity(), FitOptions(device=config.device)).device
    rows: list[dict[str, Any]] = []
    for text in config.checkpoint:
        source, file, fractions = parse_checkpoint(text)
        model = trained_model(source, file, data.num_classes).to(device)
        rows.append({"model": source, "method": "dense", "macs_kept": 1.0, "accuracy": _accuracy(model, data, config)})
        runs = [(f, method, seed) for f in fractions for method in config.methods for seed in config.seeds]
        for fraction, method, seed in runs:
            place = folder / f"{source.rpartition(':')[2]}@{fraction:g}" / method / str(seed)
            row = {"model": source, "method": method, "budget": fraction, "seed": seed}
            rows.append(row | Run(model, data, config, fraction, seed, place).play(method))
            print(rows[-1], file=sys.stderr, flush=True)
            write_results(config.output, arguments, {"settings": settings, "rows": rows}, ("torch-pruning",))
    return rows


class Run:
    """One method, budget and seed; ``folder`` has what a resume needs, and the result once there is one."""

    def __init__(
        self, model: nn.Module, data: ImageData, config: Any, fraction: float, seed: int, folder: Path
    ) -> None:
        self.dense, self.data, self.config = model, data, config
        self.fraction, self.seed, self.folder = fraction, seed, folder

    def play(self, method: str) -> dict[str, Any]:
        """Prune and train; what that gave."""
        result = self.folder / RESULT
        if result.exists():
            found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return found
        start = time.perf_counter(), time.process_time()
        seed_everything(self.seed)
        importance, _, taught = method.partition("+")
        pruned = self._ours(method) if method in OURS else self._peers(importance, distilled=bool(taught))
        example = self._example()
        macs = compress.measure(pruned, example).macs / compress.measure(self.dense, example).macs
        row = {
            "macs_kept": macs,
            "accuracy": _accuracy(pruned, self.data, self.config),
            "seconds": time.perf_counter() - start[0],
            "cpu_seconds": time.process_time() - start[1],
        }
        write_file(result, lambda partial: partial.write_text(json.dumps(row), encoding="utf-8"))
        return row

    def _ours(self, method: str) -> nn.Module:
        budget = compress.Budget(macs=self.fraction)
        batches = [images for images, _ in self._images(self.config.images)]
        if method == "shrink":
            found = compress.shrink(self.dense, self._example(), budget=budget, calibration=batches, seed=self.seed)
            model, removed = found.model, found.pruning.plan if found.pruning else compress.PrunePlan.empty()
        else:
            result = compress.prune(
                self.dense, self._example(), budget=budget, criterion="reconstruction", recover=True,
                calibration=batches, seed=self.seed,
            )  # fmt: skip
            model, removed = result.model, result.plan
        teacher = self._teacher(_stages(self.dense, removed) if self.config.feature_weight else {})
        self._train(model, 0, self.config.epochs, teacher)
        return model

    def _peers(self, importance: str, *, distilled: bool) -> nn.Module:
        import torch_pruning

        rounds = self.config.peer_rounds
        settings = {"p": 1} if importance == "l1" else {}
        scores = getattr(torch_pruning.importance, IMPORTANCES[importance])(**settings)
        macs = compress.measure(self.dense, self._example()).macs
        pruned = self.dense
        for index in range(rounds):
            if importance == "taylor":
                self._accumulate_gradients(pruned)
            target = 1 - (1 - self.fraction) * (index + 1) / rounds
            pruned = prune_to_macs(pruned, self._example(), scores, target * macs)
            epochs = 1 if index + 1 < rounds else self.config.epochs - rounds + 1
            self._train(pruned, index, epochs, self._teacher({}) if distilled else None)
        return pruned

    def _accumulate_gradients(self, model: nn.Module) -> None:
        model.zero_grad()
        for images, labels in self._images(GRADIENT_IMAGES):
            TASK.loss(model.eval()(images), labels).backward()

    def _teacher(self, features: Mapping[str, Sequence[int] | None]) -> Distillation:
        return Distillation(
            teacher=self.dense, weight=self.config.distill, temperature=self.config.temperature, features=features,
            feature_weight=self.config.feature_weight,
        )  # fmt: skip

    def _train(self, model: nn.Module, index: int, epochs: int, teacher: Distillation | None) -> None:
        config = self.config
        limit = DRY_BATCHES * config.batch_size if config.dry_run else None
        loader = self.data.loader("train", batch_size=config.batch_size, seed=self.seed, limit=limit)
        options = FitOptions(
            lr=config.lr, weight_decay=config.weight_decay, ema_decay=config.ema_decay, device=config.device,
            seed=1000 * self.seed + index,
        )  # fmt: skip
        fit(
            model, TASK, loader, epochs=epochs, options=options, distillation=teacher,
            folder=self.folder / f"round{index}",
        )  # fmt: skip
        model.eval()

    def _images(self, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Training images without augmentation, and labels, on the model's device."""
        limit = min(number, DRY_BATCHES * self.config.batch_size) if self.config.dry_run else number
        size = self.config.batch_size
        loader = self.data.loader("train", batch_size=size, augment=False, limit=limit, seed=self.seed)
        device = next(self.dense.parameters()).device
        return [move(batch, device) for batch in loader]

    def _example(self) -> torch.Tensor:
        return torch.zeros(1, *self.data.image_shape, device=next(self.dense.parameters()).device)


def _stages(dense: nn.Module, plan: compress.PrunePlan) -> dict[str, Sequence[int] | None]:
    """The stages of a network, and which of the dense one's channels come out of them."""
    stages = {name: child for name, child in dense.named_children() if isinstance(child, nn.Sequential)}
    # what writes a stage's output last is its last norm
    last = {name: [f"{name}.{inner}" for inner, _ in stage.named_parameters()] for name, stage in stages.items()}
    return {name: plan.kept(parameters[-1]) for name, parameters in last.items() if parameters}


def _accuracy(model: nn.Module, data: ImageData, config: Any) -> float:
    split = "validation" if config.validation else "test"
    limit = EVALUATION_BATCH_SIZE if config.dry_run else None
    return evaluate(model, TASK, data.loader(split, batch_size=EVALUATION_BATCH_SIZE, limit=limit))[TASK.name]


def _print(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="pruned and trained; accuracy after the last epoch", title_justify="left")
    for column in ("model", "budget", "how", "seeds", "mean", "lowest", "highest", "MACs", "CPU seconds"):
        table.add_column(column, justify="left" if column in ("model", "how") else "right")
    for key in dict.fromkeys((row["model"], row.get("budget", 1.0), row["method"]) for row in rows):
        same = [row for row in rows if (row["model"], row.get("budget", 1.0), row["method"]) == key]
        found = [row["accuracy"] for row in same]
        percents = [
            f"{value:.2%}" for value in (mean(found), min(found), max(found), max(r["macs_kept"] for r in same))
        ]
        seconds = f"{mean(row.get('cpu_seconds', 0.0) for row in same):.0f}"
        table.add_row(key[0], f"{key[1]:.3g}", key[2], str(len(same)), *percents, seconds)
    wide_console().print(table)


if __name__ == "__main__":
    sys.exit(main())
