"""Hard parameter sharing: one trunk, a head per task (Caruana 1997, "Multitask Learning", section 2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from mtl.batch import arguments
from mtl.sharing.private import Pattern, own_copy, private_tensors, split_stem
from mtl.sharing.union import UnionSoftmax
from mtl.taps import run_with_taps


class HardShared(nn.Module):
    """A trunk that tasks share, and a head for each task.

    Args:
        trunk: any module, also of torchvision, timm or Hugging Face. It gives a tensor, or a dict, tuple or model
            output, of which ``at`` then chooses
        heads: a module per task name
        at: what the head of a task reads, by task: the name of a module of the trunk, whose output it is, or a key of
            the trunk's output; default: the trunk's output
        private: what each task has a copy of its own of; all else is shared. Patterns of names of the trunk's
            parameters and buffers (``"*.bn*"``, ``"layer4.*"``: sharing up to a depth), or classes of modules
            (``nn.BatchNorm2d``). The trunk then runs once per task, but for the first children of an ``nn.Sequential``
            that have nothing private
        union: a softmax over the classes of all tasks, to be learnt as well; its logits are the output ``"union"``

    Raises:
        ValueError: if there is no head, and for a task in ``at`` without head and a pattern that fits nothing.

    Example:
        >>> import torch
        >>> model = HardShared(nn.Linear(64, 32), heads={"digit": nn.Linear(32, 10), "even": nn.Linear(32, 2)})
        >>> {name: tuple(out.shape) for name, out in model(torch.randn(5, 64)).items()}
        {'digit': (5, 10), 'even': (5, 2)}
    """

    def __init__(
        self,
        trunk: nn.Module,
        heads: Mapping[str, nn.Module],
        *,
        at: Mapping[str, str] | None = None,
        private: Sequence[Pattern] = (),
        union: UnionSoftmax | None = None,
    ) -> None:
        super().__init__()
        if not heads:
            raise ValueError("heads is empty: give one module per task, for example heads={'digit': nn.Linear(64, 10)}")
        for name in (*(at or {}), *(union.classes if union is not None else ())):
            if name not in heads:
                raise ValueError(f"there is no head for task {name!r}: the heads are {sorted(heads)}")
        self._at, self._private = dict(at or {}), tuple(private)
        own = private_tensors(trunk, private)
        self.stem, rest = split_stem(trunk, own) if own else (None, trunk)
        self.trunk = None if own else trunk
        # The first task has the trunk itself, the others copies in which all that is not private is the same object.
        copies = {name: own_copy(rest, self._private) if index else rest for index, name in enumerate(heads)}
        self.trunks = nn.ModuleDict(copies) if own else None
        self.features = nn.Identity()  # what all tasks share passes here, where nothing is private
        self.heads = nn.ModuleDict(heads)
        self.union = union

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The trunk's arguments in, ``{task: output of its head}`` out."""
        features = self._features(list(self.heads), args, kwargs)
        outputs = {name: self.heads[name](feature) for name, feature in features.items()}
        if self.union is not None:
            outputs["union"] = self.union(features[next(iter(self.union.classes))])
        return outputs

    def forward_tasks(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """``{task: input}`` in, ``{task: output of its head}`` out, where tasks have inputs of their own.

        With a union the logits of each task's input are in ``"TASK/union"``.
        """
        outputs = {}
        for name, own in inputs.items():
            args, kwargs = arguments(own)
            feature = self._features([name], args, kwargs)[name]
            outputs[name] = self.heads[name](feature)
            if self.union is not None and name in self.union.classes:
                outputs[f"{name}/union"] = self.union(feature)
        return outputs

    def auxiliary_losses(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the union adds to the loss of each task; called by ``mtl.fit``."""
        return {} if self.union is None else self.union.losses(outputs, targets)

    @property
    def representation(self) -> nn.Module | None:
        """The module whose output is all that the tasks share; None where they share more than one tensor."""
        places = {self._at.get(name) for name in self.heads}
        return self.features if self.trunk is not None and len(places) == 1 else None

    def task_parameters(self, task: str) -> Iterator[nn.Parameter]:
        """Those that belong to the task alone: its head's, and private ones of the trunk."""
        yield from self.heads[task].parameters()
        if self.trunks is not None:
            own = private_tensors(self.trunks[task], self._private)
            yield from (parameter for name, parameter in self.trunks[task].named_parameters() if name in own)

    def train(self, mode: bool = True) -> Self:
        """As for every module, but batch norms whose parameters are all frozen stay in evaluation mode: what is frozen
        must not follow the data of the task that is trained."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters(recurse=False))
            if hasattr(module, "running_mean") and parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def add_task(
        self, name: str, head: nn.Module, *, at: str | None = None, like: str | None = None, freeze: bool = False
    ) -> None:
        """Another task on the trunk as it is now.

        Args:
            name: of the task
            head: its head
            at: what the head reads, as in the class
            like: the task whose private parameters it starts from; default: the first
            freeze: whether only the new task is trained from now on, so that the outputs of the others stay as they are

        Raises:
            ValueError: if the task is there already, or ``like`` is not.
        """
        if name in self.heads:
            raise ValueError(f"there is a head for task {name!r} already: choose another name")
        if like is not None and like not in self.heads:
            raise ValueError(f"there is no task {like!r} to start from: the tasks are {sorted(self.heads)}")
        if self.trunks is not None:
            self.trunks[name] = own_copy(self.trunks[like or next(iter(self.heads))], self._private)
        self.heads[name] = head
        if at is not None:
            self._at[name] = at
        if freeze:
            self.requires_grad_(False)
            for parameter in self.task_parameters(name):
                parameter.requires_grad_(True)

    def _features(self, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        places = {name: self._at.get(name) for name in names}
        if self.trunk is not None:
            found = run_with_taps(self.trunk, set(places.values()), args, kwargs)
            shared = {place: self.features(tensor) for place, tensor in found.items()}
            return {name: shared[place] for name, place in places.items()}
        assert self.trunks is not None
        taps: dict[str | None, Tensor] = {}
        if self.stem is not None:
            modules = dict(self.stem.named_modules())
            inside = {place for place in places.values() if place in modules}
            taps = run_with_taps(self.stem, {None, *inside}, args, kwargs)
            args, kwargs = (taps.pop(None),), {}
        return {
            name: taps[place] if place in taps else run_with_taps(self.trunks[name], {place}, args, kwargs)[place]
            for name, place in places.items()
        }
