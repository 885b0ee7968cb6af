"""``prunus shrink``: a trained checkpoint goes in, one that lost channels and rank under one budget comes out."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import compress
from compress import ShrinkResult
from compress.shrink.shrinking import METHODS
from scripts.command import run_command
from scripts.factorize import FactorizeConfig, made_smaller


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig(FactorizeConfig):
    """Prune a trained model and factorise what is left, to one budget; retrain it where that is asked for.

    Args:
        methods: prune, factorize or both; default: both
        criterion: which channels go first, as for prunus prune
        exact_only: prune only what can be removed exactly
    """

    methods: list[str] | None = None
    criterion: str = "reconstruction"
    exact_only: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(run, ShrinkConfig, "prunus shrink", argv)


def run(config: ShrinkConfig) -> ShrinkResult:
    """Shrinks as ``config`` says, prints what that cost, and writes the file. Bad input is a ``ValueError``."""
    make = partial(
        compress.shrink,
        methods=tuple(config.methods or METHODS),
        criterion=config.criterion,
        exact_only=config.exact_only,
    )
    return made_smaller(config, "shrunk", make)


if __name__ == "__main__":
    sys.exit(main())
