"""Patterns that name parameters."""

from collections.abc import Collection
from fnmatch import fnmatchcase

from compress.errors import PruneError


def protected(pattern: str, names: Collection[str]) -> set[str]:
    """The names that a shell pattern of ``protect`` matches; a module's name protects what is inside it.

    Raises:
        PruneError: it matches none.
    """
    matching = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
    if not matching:
        raise PruneError(f"protect={pattern!r} matches no parameter; names look like {min(names)!r}")
    return matching
