"""The console command ``prunus``: ``prunus prune --model ...``, ``prunus factorize``, ``prunus inspect MODEL`` ..."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "prune": "prune a model to a budget, in rounds of pruning and training",
    "factorize": "replace layers by two or three thin ones, to a budget",
    "shrink": "prune a model and factorise what is left, to one budget",
    "sensitivity": "show what each layer costs in accuracy when it alone is pruned",
    "inspect": "show what can be removed from a model, and why the rest cannot",
    "train-mtl": "train several tasks together and apart, and show what sharing gains",
    "prune-mtl": "prune a model of several tasks such that no task is sacrificed",
    "demo": "train, prune, retrain and reload a small network on the digits of scikit-learn",
}
MODULES = {
    "inspect": "inspect_model",
    "train-mtl": "train_mtl",
    "prune-mtl": "prune_mtl",
}  # scripts/inspect.py would shadow the standard library's


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sub-command that ``argv`` names and returns its exit status; 2 for one that does not exist."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: prunus COMMAND [flags]     (prunus COMMAND --help lists the flags)\n")
        print("\n".join(f"  {command:<11} {purpose}" for command, purpose in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        print(f"prunus: there is no command {name!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # Imported on demand: `prunus --help` should not wait for PyTorch.
    return importlib.import_module(f"scripts.{MODULES.get(name, name)}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
