"""What pruning costs in accuracy where there is time to train: ResNet-56 on CIFAR-10, hundreds of epochs, for a GPU.

Claim: ResNet-56 (93.39 %) has 93.8 % at 2.12 x fewer MACs, 93.7 % at 2.57 x and 93.3 % at 4 x, in the last epoch. The
best that was published: DepGraph 93.77 % at 2.13 x and 93.64 % at 2.57 x from 93.53 %, PPSM 93.22 % at 4.1 x.

The flags are those of ``bench_retrain.py``; name ``--checkpoint layers:resnet56_cifar=FILE@0.4717,0.3891,0.25`` and
``--data``. Thin layers want a quarter of the learning rate: ``--methods shrink --lr 0.025``. ``--dry-run`` goes through
all of it in a few batches, on a CPU too.
"""

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import bench_retrain

DEFAULTS: dict[str, Any] = {**bench_retrain.DEFAULTS, "epochs": 300, "lr": 0.1, "methods": ["ours"], "seeds": [0]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status as of ``bench_retrain``."""
    return bench_retrain.main(argv, __file__, DEFAULTS)


if __name__ == "__main__":
    sys.exit(main())
