"""A stack of low rank as what it is: a basis that tasks share, and a small mixing for each task."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from mtl.sharing.once import BasisResponses, Once, mixed
from mtl.sharing.slots import by_task_calls, forget_counters, task_index
from mtl.sharing.stacks import Stacks

if TYPE_CHECKING:
    from mtl.sharing.soft import SoftShared

# Relative to the norm of a stack: what rounding leaves after a proximal step, and what a decomposition in float64 adds.
_EPSILONS, _DECOMPOSITION = 16, 1e-12


@dataclass(frozen=True)
class Factors:
    """The stack of one parameter, W[t] = sum_k mixing[t, k] basis[k].

    Args:
        basis: (rank, *shape)
        mixing: (number of tasks, rank); None where each task has an entry of the basis to itself, or where there is
            one entry, the same for all
    """

    basis: Tensor
    mixing: Tensor | None = None


def factorise(stack: Tensor, energy: float) -> Factors:
    """The stack (number of tasks, *shape) in as few numbers as keep this part of the differences between tasks.

    The rank is the smallest whose error, the sum of the squared singular values left out, is at most ``1 - energy`` of
    the squared deviations from the mean over tasks: of what makes the tasks differ, not of what they have in common.
    Where that does not save anything, the stack stays as it is.
    """
    num_tasks, size = len(stack), stack[0].numel()
    if num_tasks == 1 or not stack.is_floating_point():
        return at_rank(stack, num_tasks, mixed=False)
    matrix = stack.reshape(num_tasks, -1).double()
    rounding = (max(_EPSILONS * torch.finfo(stack.dtype).eps, _DECOMPOSITION) * matrix.norm()) ** 2
    differences = (matrix - matrix.mean(dim=0, keepdim=True)).square().sum()
    if differences <= rounding:
        return at_rank(stack, 1, mixed=False)
    values = torch.linalg.svdvals(matrix)
    errors = values.square().flip(0).cumsum(0).flip(0)  # what is lost by keeping 0, 1, 2, ... singular values
    rank = max(1, int((errors > (1 - energy) * differences + rounding).sum()))
    saves = rank * (size + num_tasks) < num_tasks * size
    return at_rank(stack, rank if saves else num_tasks, mixed=saves)


def at_rank(stack: Tensor, rank: int, *, mixed: bool) -> Factors:
    """The best approximation of a stack (number of tasks, *shape) by a basis of this rank, mixed by each task; or, not
    mixed, the mean over tasks (rank 1) or the stack itself."""
    num_tasks = len(stack)
    if not mixed and rank == num_tasks:
        return Factors(stack.clone())
    matrix = stack.reshape(num_tasks, -1).double()
    if not mixed:
        return Factors(matrix.mean(dim=0).to(stack.dtype).reshape(1, *stack.shape[1:]))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    scale = num_tasks**0.5  # so that mixing is about 1, and the basis as large as the weights were
    basis = values[:rank, None] * right[:rank] / scale
    return Factors(basis.to(stack.dtype).reshape(rank, *stack.shape[1:]), (left[:, :rank] * scale).to(stack.dtype))


class Collapsed(nn.Module):
    """The models of ``SoftShared.collapse``: the same tasks, inputs and outputs in fewer parameters.

    Parameters are ``bases`` and ``mixings``, and ``models[task]`` for what each task has to itself. In a forward pass
    each task's weights are put together from its bases, ``rank * size`` multiplications and additions for each stack
    and task whatever the batch.

    In evaluation mode without gradients, where all tasks get the same input, layers cost less as well. As long as
    weights and statistics are the same for all tasks, everything runs once. A layer after that whose weight is a
    mixture of ``rank`` bases runs once with each basis, and each task mixes the responses. Beyond it tasks go their own
    ways, and their layers cost what they did. ``task(name)`` gives one task's model by itself.

    Args:
        model: what was collapsed; it stays as it is
        factors: of each of its stacks of parameters
        once: names of the buffers that all tasks share; None for those that are the same
    """

    def __init__(self, model: SoftShared, factors: Mapping[str, Factors], once: Collection[str] | None = None) -> None:
        super().__init__()
        self.tasks, self.slots = model.tasks, model.slots
        trainable = {name: stack.requires_grad for name, stack in model.stacks.named_parameters()}
        self.models = copy.deepcopy(model.models)
        self.bases = Stacks(
            {name: nn.Parameter(each.basis, trainable[name]) for name, each in factors.items()},
            {
                name: (stack[:1] if (_is_equal(stack) if once is None else name in once) else stack).clone()
                for name, stack in model.stacks.named_buffers()
            },
            model.transient,
        )
        mixings = {name: each.mixing for name, each in factors.items() if each.mixing is not None}
        self.mixings = Stacks({name: nn.Parameter(mixing, trainable[name]) for name, mixing in mixings.items()}, {})
        self.training = model.training
        self.register_load_state_dict_post_hook(forget_counters)

    @classmethod
    def restored(cls, model: SoftShared, state_dict: Mapping[str, Tensor]) -> Collapsed:
        """A collapsed model from what its ``state_dict`` saved, and a fresh ``SoftShared`` of the same kind.

        Example:
            >>> from mtl import SoftShared, Task
            >>> new = lambda: SoftShared(lambda task: nn.Linear(9, 9), [Task(n, nn.MSELoss()) for n in "abc"])
            >>> state = new().collapse().state_dict()
            >>> again = Collapsed.restored(new(), state)
        """
        mixings = {name.removeprefix("mixings.") for name in state_dict if name.startswith("mixings.")}
        saved = {name: state_dict.get(f"bases.{name}", stack[:1]) for name, stack in model.stacks.named_buffers()}
        plan = CollapsePlan(
            len(model.tasks),
            tuple(
                StackRank(name, len(state_dict[f"bases.{name}"]), name in mixings)
                for name, _ in model.stacks.named_parameters()
            ),
            tuple(name for name, value in saved.items() if len(value) < len(model.tasks)),
        )
        collapsed = plan.carry_out(model, empty=True)
        collapsed.load_state_dict(state_dict)
        return collapsed

    @property
    def ranks(self) -> dict[str, int]:
        """How many entries the basis of each stack has: 1 where all tasks share one, at most the number of tasks."""
        return {name: len(basis) for name, basis in self.bases.named_parameters()}

    @property
    def made_by(self) -> CollapsePlan:
        """What makes such a model of a fresh ``SoftShared``, as plain data; ``compress.save`` asks for it."""
        mixed_ones = {name for name, _ in self.mixings.named_parameters()}
        stacks = (StackRank(name, len(basis), name in mixed_ones) for name, basis in self.bases.named_parameters())
        shared = (name for name, buffer in self.bases.named_buffers() if len(buffer) < len(self.tasks))
        return CollapsePlan(len(self.tasks), tuple(stacks), tuple(shared))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As of ``SoftShared``."""
        calls = by_task_calls(self.tasks, args, kwargs)
        # .data: as in SoftShared.forward
        buffers = {name: [each.data for each in stack.unbind()] for name, stack in self.bases.named_buffers()}
        entries = {**{name: basis.unbind() for name, basis in self.bases.named_parameters()}, **buffers}
        mixings = {name: mixing.unbind() for name, mixing in self.mixings.named_parameters()}
        alike = len(calls) > 1 and len({id(call) for call in calls.values()}) == 1
        once = None
        if alike and not self.training and not torch.is_grad_enabled():
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            shared = [own for name, own in entries.items() if len(own) == 1 or name in mixings]
            once = Once([*inputs, *(tensor for own in shared for tensor in own)])
        outputs = {}
        for task, (positional, named) in calls.items():
            index = self.tasks.index(task)
            tensors, mixtures = {}, {}
            for name, own in entries.items():
                if name in mixings:
                    coefficients = mixings[name][index].unbind()
                    tensors[name] = mixed(own, coefficients)
                    mixtures[id(tensors[name])] = own, coefficients
                else:
                    tensors[name] = own[index if len(own) > 1 else 0]
            with ExitStack() as stack:
                if once is not None:
                    stack.enter_context(once)
                    stack.enter_context(BasisResponses(once, mixtures))
                output = self.slots.call(self.models[task], tensors, positional, named)
            # what tasks have in common is still each task's own to change
            outputs[task] = output if once is None else tree_map_only(Tensor, once.own, output)
        return outputs

    def task(self, name: str) -> nn.Module:
        """As of ``SoftShared``: a copy of one task's model with weights of its own."""
        index = task_index(self.tasks, name)
        mixings = dict(self.mixings.named_parameters())
        tensors = {}
        for key, own in (*self.bases.named_parameters(), *self.bases.named_buffers()):
            if key in mixings:
                tensors[key] = mixed(own.unbind(), mixings[key][index].unbind())
            else:
                tensors[key] = own[index if len(own) > 1 else 0]
        return self.slots.filled_copy(self.models[name], tensors)

    def extra_repr(self) -> str:
        mixed_ranks = [len(basis) for name, basis in self.bases.named_parameters()]
        return f"tasks={len(self.tasks)}, ranks={mixed_ranks}"


def _is_equal(stack: Tensor) -> bool:
    """Whether all tasks have the same. Not counters: every task's training would advance it."""
    return stack.is_floating_point() and bool((stack == stack[:1]).all())


@dataclass(frozen=True)
class StackRank:
    """Entries of the basis of the stack ``name``, and whether tasks mix them; see :func:`at_rank`."""

    name: str
    rank: int
    mixed: bool


@dataclass(frozen=True)
class CollapsePlan:
    """How a ``SoftShared`` is collapsed, as plain data: at which rank each stack, and which buffers are kept ``once``.

    It has what ``compress`` asks of a plan, so that files of collapsed models load into a fresh ``SoftShared``.

    >>> CollapsePlan.from_json(CollapsePlan(2).to_json()) == CollapsePlan(2)
    True
    """

    kind: ClassVar[str] = "collapse"
    num_tasks: int
    stacks: tuple[StackRank, ...] = ()
    once: tuple[str, ...] = ()

    def carry_out(self, model: nn.Module, *, inplace: bool = False, empty: bool = False) -> Collapsed:
        """The collapsed model, always a new one.

        Args:
            model: a ``SoftShared`` of the kind that the plan was made for
            inplace: nothing is
            empty: weights do not matter, as others are loaded next

        Raises:
            ValueError: for another kind of model.
        """
        stacks = getattr(model, "stacks", None)
        found = dict(stacks.named_parameters()) if isinstance(stacks, Stacks) else {}
        named = {stack.name: stack for stack in self.stacks}
        if set(found) != set(named) or any(len(stack) != self.num_tasks for stack in found.values()):
            differing = ", ".join(sorted(set(found) ^ set(named))[:3])
            raise ValueError(
                f"the plan collapses {len(named)} stacks of {self.num_tasks} tasks, which this {type(model).__name__} "
                f"does not have ({differing or 'it has other tasks'}): give a fresh SoftShared, built as the first was"
            )
        factors = {}
        for name, stack in found.items():
            rank, mixed_here = named[name].rank, named[name].mixed
            if empty:
                mixing = stack.new_empty(self.num_tasks, rank) if mixed_here else None
                factors[name] = Factors(stack.new_empty(rank, *stack.shape[1:]), mixing)
            else:
                factors[name] = at_rank(stack.detach(), rank, mixed=mixed_here)
        return Collapsed(cast("SoftShared", model), factors, self.once)

    def to_json(self) -> str:
        """The plan as a JSON document."""
        return json.dumps({"version": 1, "kind": self.kind, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> CollapsePlan:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: the text is not such a plan, or of a later version.
        """
        try:
            data = json.loads(text)
            if (data["kind"], data["version"]) != (cls.kind, 1):
                raise ValueError(f"kind {data['kind']!r}, version {data['version']!r}")
            stacks = tuple(StackRank(str(one["name"]), int(one["rank"]), bool(one["mixed"])) for one in data["stacks"])
            return cls(int(data["num_tasks"]), stacks, tuple(data["once"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a plan of a collapse ({error}): pass what to_json() gave") from error
