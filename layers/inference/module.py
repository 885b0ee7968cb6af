"""The module that `optimize_for_inference` returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from layers.inference.capture import Call, Capture
from layers.inference.report import Report
from layers.inference.runner import Program
from layers.inference.structure import Structure, flatten

_MOST_KNOWN = 100  # shapes whose program is remembered


@dataclass(frozen=True)
class Fast:
    """What runs the calls that ``capture`` covers: the first of ``programs`` that takes the batch size.

    ``example`` are the lengths of the example's varying axes; ``contiguous`` says of each tensor that is returned
    whether the model itself returns it so.
    """

    capture: Capture
    programs: tuple[Program, ...]
    example: dict[str, int]
    contiguous: tuple[bool, ...]

    @cached_property
    def positional(self) -> int:
        """How many tensors a call takes by position, or -1 where it takes anything else."""
        return self.capture.signature.structure.positional

    def find(self, leaves: Sequence[Any]) -> Program | None:
        signature = self.capture.signature
        if not signature.covers(leaves):
            return None
        as_example = signature.lengths(leaves) == self.example
        return next((program for program in self.programs if program.any_batch or as_example), None)

    def call(self, program: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
        found = program.run(*tensors)
        return [x.contiguous() if dense else x for x, dense in zip(found, self.contiguous, strict=True)]


class OptimizedModule(nn.Module):
    """A module for inference only, with the interface of the one it was made from.

    ``report`` says what was done; `print` it. Calls that the fast program does not cover, such as images of another
    size, run through a copy of the model in evaluation mode. Nothing here tracks gradients.
    """

    report: Report

    def __init__(self, model: nn.Module, report: Report, fast: Fast | None) -> None:
        super().__init__()
        self.training = False
        self.report = report
        # not submodules: parameters that can be changed would suggest that the programs follow
        self.__dict__.update(_model=model, _fast=fast, _known={})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._run(*args, **kwargs)
        with torch.no_grad():
            return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        fast, model, known = self.__dict__["_fast"], self.__dict__["_model"], self.__dict__["_known"]
        if fast is None:
            return model(*args, **kwargs)
        plain = not kwargs and len(args) == fast.positional and all(isinstance(given, Tensor) for given in args)
        leaves = args if plain else self._leaves(fast.capture.signature.structure, args, kwargs)
        if leaves is None:
            return model(*args, **kwargs)
        # Looking up a call again takes 3 us, deciding anew ten times that: as long as many a layer.
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = tuple([(x.shape, x.dtype, x.device, x.layout) for x in tensors]) if plain else None
        program = known.get(key) or fast.find(leaves)
        if program is None:
            return model(*args, **kwargs)
        if key is not None and len(known) < _MOST_KNOWN:
            known[key] = program
        return fast.capture.result(fast.call(program, tensors))

    def _leaves(self, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any] | None:
        call = Call.of(self.__dict__["_model"], *args, **kwargs)
        leaves, found = flatten((call.args, call.kwargs))
        return leaves if found == structure else None

    def __getattr__(self, name: str) -> Any:
        """Whatever else the model has: a parent that was left as it is may read its child's weight."""
        model = self.__dict__.get("_model")
        if model is None or name.startswith("__"):
            return super().__getattr__(name)
        return getattr(model, name)

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise ValueError("an optimised module is for inference only: train the model it was made from")
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        raise ValueError("an optimised module stays in its device and type: move the model, and optimise it again")

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        return OptimizedModule(self.__dict__["_model"], self.report, self.__dict__["_fast"])  # nothing of it changes

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "an optimised module cannot be saved, since its code and weights are made for this machine: "
            "save the state of the model, and optimise it again after loading"
        )

    def extra_repr(self) -> str:
        return str(self.report)
