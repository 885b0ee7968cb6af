"""From a config dataclass to a command: flags and YAML through jsonargparse, and one clear line for bad input."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

BAD_INPUT = 2  # exit status
INTERRUPTED = 130  # what a shell reports for Ctrl-C
LISTS = (
    "--mean",
    "--std",
    "--input_shape",
    "--criteria",
    "--ratios",
    "--methods",
    "--protect",
    "--targets",
    "--features",
    "--classes",
)  # flags that take several values


class FlagParser(ArgumentParser):
    """Flags and YAML of one dataclass. Words in flags are joined by dashes, as people type them."""

    def __init__(self, config: type, prog: str) -> None:
        super().__init__(prog=prog, description=_first_line(config), exit_on_error=False)
        self.add_argument("--config", action="config", help="YAML file with any of these flags; flags after it win")
        self.add_class_arguments(config)

    def format_help(self, *arguments: Any) -> str:
        """The help text, with dashes in the flags."""
        return _with_dashes(super().format_help(*arguments))


def run_command(run: Callable[[Any], object], config: type, prog: str, argv: Sequence[str] | None) -> int:
    """Parses ``argv`` into a ``config``, hands it to ``run`` and returns the exit status.

    Bad input (any ``ValueError``, and files that cannot be read or written) is one line on the standard error and
    status 2; everything else is a defect and keeps its traceback.
    """
    try:
        parser = FlagParser(config, prog)
        arguments = parser.parse_args(_as_jsonargparse_likes(sys.argv[1:] if argv is None else argv))
        values = parser.instantiate(arguments).as_dict()
        del values["config"]
        run(config(**values))
    except (argparse.ArgumentError, ValueError, OSError) as error:
        print(f"{prog}: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command goes on from what is on the disk", file=sys.stderr)
        return INTERRUPTED
    return 0


def _as_jsonargparse_likes(argv: Sequence[str]) -> list[str]:
    """Natural flags in the form of jsonargparse.

    >>> _as_jsonargparse_likes(["--batch-size", "8", "--recover", "--mean", "0.4", "0.5", "--std=0.1,0.2"])
    ['--batch_size=8', '--recover=true', '--mean=[0.4, 0.5]', '--std=[0.1, 0.2]']
    """
    result: list[str] = []
    tokens = list(argv)
    while tokens:
        flag, equals, value = tokens.pop(0).partition("=")
        if not flag.startswith("--"):
            result.append(flag + equals + value)
            continue
        flag = flag.replace("-", "_").replace("__", "--", 1)
        values = [value] if equals else []
        while not equals and tokens and not tokens[0].startswith("--"):
            values.append(tokens.pop(0))
        if flag in ("--help", "--print_config") and not values:
            result.append(flag)
        elif flag in LISTS and values and not values[0].startswith("["):
            result.append(f"{flag}=[{', '.join(map(_quoted, ','.join(values).split(',')))}]")
        else:
            result += [f"{flag}={values[0] if values else 'true'}", *values[1:]]
    return result


def _quoted(value: str) -> str:
    """A value of a list as YAML reads it back: numbers as they are, words in quotes, as ``*`` has a meaning there."""
    try:
        float(value)
    except ValueError:
        return json.dumps(value)
    return value


def _first_line(config: type) -> str:
    return (config.__doc__ or "").strip().split("\n")[0]


def _one_line(error: Exception) -> str:
    """The message of an error on one line; for a flag of the wrong type, which and what, without the type algebra."""
    text = " ".join(str(error).split())
    if wrong := re.search(r'[Pp]arser key "([\w.]+)".*(?:Given value:|Got value:) (.*)$', text):
        return f"--{wrong[1].replace('_', '-')} cannot be {wrong[2]!r}; see --help for what it takes"
    if text.startswith("unrecognized arguments:"):
        return f"there is no flag {_with_dashes(text.partition(': ')[2])}; see --help"
    if text.startswith("the following arguments are required:"):
        return _with_dashes(f"these flags are required: --{text.partition(': ')[2].replace(', ', ', --')}")
    return text or type(error).__name__


def _with_dashes(text: str) -> str:
    return re.sub(r"--[a-z_.]+", lambda flag: flag[0].replace("_", "-"), text)
