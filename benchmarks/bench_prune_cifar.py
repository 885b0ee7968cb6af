"""What pruning a trained checkpoint to half of its MACs costs in accuracy: prune, train, repeat on real images.

Claim: ResNet-20 (91.73 % on CIFAR-10) keeps at least 90.0 % after 3 rounds of 2 epochs. Neither the checkpoint nor the
images are part of prunus: name them by ``--checkpoint`` and ``--data``.

It runs what ``prunus prune --validation 0`` runs and reads the ``history.json`` that this leaves: no choice is made, so
that all training images train, and the accuracy is that on the test images.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

import compress
from benchmarks.common import IMAGENET_MEAN, IMAGENET_STD, parser, skipped, wide_console, write_results
from compress.report import HISTORY
from scripts.config import PruneConfig
from scripts.prune import run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0, also where it has nothing to run on, and 2 for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = parser(__file__, "accuracy of a checkpoint after each round of pruning and training")
    flags.add_argument("--checkpoint", help="weights of the model")
    flags.add_argument("--data", help="imagefolder:PATH (with train/ and test/), cifar10:PATH, cifar100:PATH or digits")
    flags.add_argument("--model", default="layers:resnet20_cifar", help="SOURCE:NAME")
    flags.add_argument("--macs", type=float, default=0.5, help="fraction to keep")
    flags.add_argument("--criterion", default="l2")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--epochs", type=int, default=2, help="of training in each round")
    flags.add_argument("--lr", type=float, help="peak learning rate; default: that of prunus prune")
    flags.add_argument("--recover", action="store_true", help="re-estimate batch norms before training")
    flags.add_argument("--mean", type=float, nargs="+", default=IMAGENET_MEAN, help="per channel")
    flags.add_argument("--std", type=float, nargs="+", default=IMAGENET_STD, help="per channel")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--device", default="auto")
    flags.add_argument("--folder", help="of the run, to resume it; default: a temporary one")
    config = flags.parse_args(arguments)
    if config.checkpoint is None or config.data is None:
        return skipped(f"{Path(__file__).name} needs --checkpoint FILE and --data imagefolder:PATH")
    names = ("checkpoint", "data", "model", "criterion", "rounds", "epochs", "lr", "recover", "mean", "std", "seed")
    settings = {name: getattr(config, name) for name in (*names, "device") if getattr(config, name) is not None}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.folder or temporary)
        resumed = (folder / HISTORY).exists()
        start = time.perf_counter()
        try:
            run(PruneConfig(**settings, validation=0.0, budget=compress.Budget(macs=config.macs), folder=str(folder)))
        except (ValueError, OSError) as error:
            print(f"{Path(__file__).stem}: {error}", file=sys.stderr)
            return 2
        seconds = None if resumed else time.perf_counter() - start  # a resumed run has no time of its own
        history = json.loads((folder / HISTORY).read_text(encoding="utf-8"))["rounds"]
    rounds = [_row(record, history[0]) for record in history]
    _print(config.model, rounds, seconds)
    for path in ("checkpoint", "data"):  # where the files lie is nobody's business
        settings[path] = Path(settings[path]).name
    results = {"settings": {**settings, "macs": config.macs}, "seconds": seconds, "rounds": rounds}
    write_results(config.output, arguments, results)
    return 0


def _row(record: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    return {
        "round": record["round"],
        "accuracy": record["accuracy"],
        "macs_kept": record["macs"] / dense["macs"],
        "params_kept": record["params"] / dense["params"],
        "latency_kept": record["latency_seconds"] / dense["latency_seconds"],
    }


def _print(model: str, rounds: Sequence[dict[str, Any]], seconds: float | None) -> None:
    took = "resumed" if seconds is None else f"{seconds:.0f} s"
    table = Table(title=f"{model}: prune, train, repeat ({took})", title_justify="left")
    for column in ("round", "accuracy", "MACs", "params", "latency"):
        table.add_column(column, justify="right")
    for row in rounds:
        kept = (f"{row[name]:.1%}" for name in ("macs_kept", "params_kept", "latency_kept"))
        table.add_row(str(row["round"]), f"{row['accuracy']:.2%}", *kept)
    wide_console().print(table)


if __name__ == "__main__":
    sys.exit(main())
