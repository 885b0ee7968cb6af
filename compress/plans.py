"""What all plans are: plain data that says how a smaller model is made of a model, and that a file can hold."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, Self, TypeVar, runtime_checkable

from torch import nn

from compress.errors import PruneError


@runtime_checkable
class Plan(Protocol):
    """How one model is made of another of its class; with this, :func:`compress.apply`, ``save`` and ``load`` take it.

    ``kind`` names it in its JSON document, which is an object with that under "kind".
    """

    kind: ClassVar[str]

    def carry_out(self, model: nn.Module, *, inplace: bool = False, empty: bool = False) -> nn.Module:
        """The model that the plan makes: a changed copy of ``model``, or ``model`` itself if ``inplace``.

        Args:
            empty: values of new parameters do not matter, as others are loaded next.

        Raises:
            PruneError: the plan does not fit; the model is as before.
        """

    def to_json(self) -> str:
        """The plan as a JSON document."""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote; a :class:`PruneError` says why that cannot be read."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Within the block, whatever shows that a document is not ``what`` is a :class:`PruneError` that says so."""
    try:
        yield
    except PruneError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PruneError(f"not {what} ({type(error).__name__}: {error}): pass what to_json() gave") from error


def document(text: str, what: str, kind: str, version: int) -> dict[str, Any]:
    """The JSON document of a plan of this kind and version; call it inside of :func:`reading`."""
    data: dict[str, Any] = json.loads(text)
    if (found := data.get("kind", OLDEST)) != kind:
        raise PruneError(f"not {what} but {found!r}: pass what its to_json() gave")
    if data["version"] != version:
        raise PruneError(f"the plan has format version {data['version']}, this prunus reads {version}: upgrade it")
    return data


PLANS: dict[str, type[Plan]] = {}
OLDEST = "prune"  # the kind of documents that do not name theirs: there was one

P = TypeVar("P", bound=type[Plan])


def plan_kind(cls: P) -> P:
    """Class decorator: files may hold such plans from now on.

    >>> {"prune", "factorize", "shrink"} <= set(PLANS)
    True
    """
    PLANS[cls.kind] = cls
    return cls


def read_plan(text: str) -> Plan:
    """The plan in a JSON document, whatever its kind.

    Raises:
        PruneError: the text is no plan, or one of an unknown kind.
    """
    with reading("a plan"):
        kind = json.loads(text).get("kind", OLDEST)
    if kind not in PLANS:
        raise PruneError(
            f"a plan of kind {kind!r} is unknown (known: {', '.join(sorted(PLANS))}): import what makes it, or upgrade"
        )
    return PLANS[kind].from_json(text)
