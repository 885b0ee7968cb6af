"""Soft parameter sharing: every task has its own model, and corresponding parameters are coupled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from layers.nuclear import singular_values
from mtl.sharing.collapse import Collapsed, CollapsePlan, factorise
from mtl.sharing.couplings import Coupling, Stacked
from mtl.sharing.matching import Matching, Tensors, match
from mtl.sharing.slots import Slots, by_task_calls, forget_counters, task_index
from mtl.sharing.stacks import Stacks
from mtl.sharing.together import Together
from mtl.task import Task, check_tasks

Init = Literal["same", "different"]
Run = Literal["auto", "loop", "stacked"]


class SoftShared(nn.Module):
    """One model per task; parameters that all of them have are stacked along a task axis and coupled.

    Matched parameters are the entries of ``stacks``, each (number of tasks, *shape); the rest of each model, such as a
    head of its own size, is in ``models[task]``. ``print(model.matched)`` says what is what.

    ``model(x)`` is ``{task: output}``. For inputs of their own, pass a dict by task name, ``model({"a": x, "b": y})``:
    only those tasks run. On a CPU the models run one after the other over views of the stacks. On CUDA they run as one
    stacked computation (``torch.func.vmap``) where they are alike up to one head at the end and get inputs of one
    shape, and else one after the other.

    Training adds ``model.penalty()`` to the loss and calls ``model.proximal_step(lr)`` after each step of the
    optimiser; ``mtl.fit`` does both.

    Args:
        build: makes a fresh model for a task
        tasks: one or more
        coupling: see ``mtl.sharing.couplings``; None trains the models independently
        init: "same" gives matched parameters and buffers the values of the first task's model. Channels of networks
            with different starts do not correspond to each other, so "different" suits linear models and comparisons
        run: "loop" or "stacked" instead of the choice by device

    Raises:
        ValueError: for models that have nothing in common, one model built for two tasks, or a coupling that names
            parameters or tasks that there are not.

    Example:
        >>> from mtl import TraceNorm
        >>> tasks = [Task(name, loss=nn.MSELoss()) for name in ("a", "b")]
        >>> model = SoftShared(lambda task: nn.Linear(3, 1), tasks, TraceNorm(0.1))
        >>> {name: tuple(output.shape) for name, output in model(torch.zeros(5, 3)).items()}
        {'a': (5, 1), 'b': (5, 1)}
        >>> print(model.matched)
        matched over 2 tasks: 2 parameters of 4 numbers each
    """

    plan_kinds: ClassVar = (CollapsePlan,)  # what files of models made of this one may hold; ``compress.load`` asks

    def __init__(
        self,
        build: Callable[[Task], nn.Module],
        tasks: Task | Sequence[Task],
        coupling: Coupling | None = None,
        *,
        init: Init = "same",
        run: Run = "auto",
    ) -> None:
        super().__init__()
        if init not in get_args(Init) or run not in get_args(Run):
            raise ValueError(f"init is {init!r} and run is {run!r}: see the choices in the documentation of SoftShared")
        models = {task.name: build(task) for task in check_tasks(tasks)}
        _check_models(models)
        tensors = {name: Tensors.of(model) for name, model in models.items()}
        self.matched: Matching = match(tensors)
        self.tasks = tuple(models)
        self.coupling = coupling
        self.run: Run = run
        own = list(tensors.values())
        self.slots = Slots({name: own[0].aliases[name] for name in (*self.matched.parameters, *self.matched.buffers)})
        self.stacks = Stacks(
            {name: _stacked([each.parameters[name] for each in own], init) for name in self.matched.parameters},
            {name: _stacked([each.buffers[name] for each in own], init).data for name in self.matched.buffers},
            own[0].transient,
        )
        self.transient = own[0].transient
        for model in models.values():
            self.slots.fill(model, dict.fromkeys(self.slots.aliases))
        self.models = nn.ModuleDict(models)
        self.register_load_state_dict_post_hook(forget_counters)
        self.num_steps: Tensor
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self._stacked: Together | None = None
        if coupling is not None:
            coupling.check(self._coupled())

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs of a model, the same for all tasks or by task, in; ``{task: output}`` out."""
        calls = by_task_calls(self.tasks, args, kwargs)
        together = self._together()
        if together is not None:
            try:
                outputs = together({**dict(self.stacks.named_parameters()), **dict(self.stacks.named_buffers())}, calls)
            except ValueError as error:
                self._apart(error)
            else:
                if outputs is not None:
                    return outputs
        parameters = {name: stack.unbind() for name, stack in self.stacks.named_parameters()}
        # .data: slices count their versions together, and autograd would take one task's update for another's
        buffers = {name: [each.data for each in stack.unbind()] for name, stack in self.stacks.named_buffers()}
        slices = {**parameters, **buffers}
        outputs = {}
        for task, (positional, named) in calls.items():
            index = self.tasks.index(task)
            views = {name: own[index] for name, own in slices.items()}
            outputs[task] = self.slots.call(self.models[task], views, positional, named)
        return outputs

    def forward_tasks(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """``{task: input}`` in, ``{task: output}`` out; only those tasks run."""
        return self(dict(inputs))

    def penalty(self) -> Tensor:
        """What the coupling adds to the loss: a scalar, 0 without a coupling."""
        device = self.num_steps.device
        if self.coupling is None:
            return torch.zeros((), device=device)
        with torch.autocast(device.type, enabled=False):
            return torch.as_tensor(self.coupling.penalty(self._coupled()), device=device)

    def proximal_step(self, lr: float) -> None:
        """What the coupling does after a step of the optimiser at this learning rate; also counts steps for warm-up."""
        if self.coupling is not None:
            self.coupling.proximal_step(self._coupled(), lr)
        self.num_steps += 1

    def spectra(self) -> dict[str, Tensor]:
        """Singular values of each stack as a matrix (tasks x all others), falling: (at most number of tasks,)."""
        stacks = dict(self.stacks.named_parameters())
        return dict(
            zip(stacks, singular_values([stack.reshape(len(stack), -1) for stack in stacks.values()]), strict=True)
        )

    def task(self, name: str) -> nn.Module:
        """A copy of one task's model, as ``build`` made it, with the present values.

        Raises:
            ValueError: for an unknown task.
        """
        index = task_index(self.tasks, name)
        values = {name: stack[index] for name, stack in (*self.stacks.named_parameters(), *self.stacks.named_buffers())}
        return self.slots.filled_copy(self.models[name], values)

    def collapse(self, energy: float = 1.0) -> Collapsed:
        """A smaller model for the same tasks: of each stack of low rank, a basis that tasks share and mix.

        Args:
            energy: in (0, 1], the part of the squared differences between tasks to keep in each stack; with 1 the
                outputs stay the same

        Raises:
            ValueError: for an energy out of range.
        """
        if not 0 < energy <= 1:
            raise ValueError(f"energy is {energy!r}, but it must be in (0, 1]")
        factors = {name: factorise(stack.detach(), energy) for name, stack in self.stacks.named_parameters()}
        return Collapsed(self, factors)

    def extra_repr(self) -> str:
        return f"coupling={self.coupling}"

    def _coupled(self) -> Stacked:
        return Stacked(self.tasks, dict(self.stacks.named_parameters()), self.num_steps)

    def _together(self) -> Together | None:
        if self.run == "loop" or (self.run == "auto" and self.num_steps.device.type != "cuda"):
            return None
        if self._stacked is None:
            try:
                self._stacked = Together(dict(self.models.items()), self.matched, self.slots)
            except ValueError as error:
                self._apart(error)
        return self._stacked

    def _apart(self, error: ValueError) -> None:
        """Run the models one after the other from now on, and say why; what was asked for explicitly is an error."""
        if self.run == "stacked":
            raise ValueError(f"run='stacked' is not possible: {error}; use run='auto' or 'loop'") from None
        warnings.warn(f"the models run one after the other, which is slower: {error}", stacklevel=4)
        self.run, self._stacked = "loop", None


def _check_models(models: Mapping[str, nn.Module]) -> None:
    seen: dict[int, str] = {}
    for task, model in models.items():
        if not isinstance(model, nn.Module):
            raise ValueError(f"build returned a {type(model).__name__} for task {task!r}, but it must be an nn.Module")
        for name, parameter in model.named_parameters():
            if nn.parameter.is_lazy(parameter):
                raise ValueError(f"task {task!r}: parameter {name} has no shape yet: run the model once in build")
            if seen.setdefault(id(parameter), task) != task:
                raise ValueError(
                    f"the models of tasks {seen[id(parameter)]!r} and {task!r} share parameter {name}: build must make "
                    "a new model at each call"
                )


def _stacked(tensors: Iterable[Tensor], init: Init) -> nn.Parameter:
    tensors = list(tensors)
    values = [tensors[0]] * len(tensors) if init == "same" else tensors
    return nn.Parameter(torch.stack([value.detach() for value in values]), tensors[0].requires_grad)
