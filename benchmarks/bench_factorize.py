"""What factorisation costs in accuracy where nothing is trained: a few unlabelled images, one CPU, a minute.

Claim: ResNet-20 (91.73 % on CIFAR-10) keeps 90.9 % at 1.67 x and 90.2 % at 2.0 x fewer MACs with layers of low rank
alone. Neither the checkpoints nor the images are part of prunus: name them by flags.

Labels are used for nothing but the accuracy on the test images.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import compress
from benchmarks.bench_no_training import (
    accuracy_on_test,
    calibration_images,
    print_rows,
)
from benchmarks.common import checkpoint_parser, parse_checkpoint, skipped, trained_model, write_results
from compress.cost import relative_latency
from compress.factorize.options import METHODS
from mtl.data import ImageData
from scripts.sources import open_data

TIMED_IMAGES = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0, also where it has nothing to run on, and 2 for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = checkpoint_parser(__file__, "accuracy of checkpoints that were factorised without any training")
    flags.add_argument("--methods", nargs="+", default=["all"], choices=["all", *METHODS], help="to compare")
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
    print_rows("factorised without training", rows)
    settings = {"images": config.images, "batch_size": config.batch_size, "seed": config.seed}
    write_results(config.output, arguments, {"settings": settings, "rows": rows})
    return 0


def _rows(text: str, data: ImageData, config: Any) -> Iterator[dict[str, Any]]:
    """One row a fraction, set of methods, and whether what came out was recovered."""
    source, file, fractions = parse_checkpoint(text)
    model = trained_model(source, file, data.num_classes)
    batches = calibration_images(data, config)
    accuracy = accuracy_on_test(model, data)
    yield {"model": source, "method": "dense", "macs_kept": 1.0, "accuracy": accuracy, "seconds": 0.0, "cpu_seconds": 0}
    ways = [(fraction, name, recover) for fraction in fractions for name in config.methods for recover in (False, True)]
    for fraction, name, recover in ways:
        wall, cpu = time.perf_counter(), time.process_time()
        result = compress.factorize(
            model,
            batches[0][:1],
            budget=compress.Budget(macs=fraction),
            methods=METHODS if name == "all" else (name,),
            calibration=batches,
            recover=recover,
            seed=config.seed,
        )
        row = {"model": source, "method": f"{name}, {'recovered' if recover else 'nothing else'}", "budget": fraction}
        row |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        row |= {"macs_kept": result.after.macs / result.before.macs, "accuracy": accuracy_on_test(result.model, data)}
        row |= {"latency": relative_latency(result.model, model, batches[0][:TIMED_IMAGES])}
        print(row, file=sys.stderr)
        yield row


if __name__ == "__main__":
    sys.exit(main())
