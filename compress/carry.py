"""Optimiser state from one round to the next: saved by parameter name, cut with the parameters, given to the next one.

A round hands its state on through a file, so that a run that was killed goes on with the same numbers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.errors import PruneError


class OptimizerState(Optimizer):
    """The state that an optimiser of class ``kind`` keeps for the parameters of a model; it takes no steps itself.

    >>> model = nn.Linear(2, 1)
    >>> OptimizerState(model, "SGD", {"weight": {"momentum_buffer": torch.ones(1, 2)}}).by_name(model)
    {'weight': {'momentum_buffer': tensor([[1., 1.]])}}
    """

    def __init__(self, model: nn.Module, kind: str, states: dict[str, dict[str, Any]]) -> None:
        super().__init__(model.parameters(), {})
        self.kind = kind
        for name, state in states.items():
            self.state[model.get_parameter(name)] = dict(state)

    @classmethod
    def of(cls, optimizer: Optimizer, model: nn.Module) -> "OptimizerState":
        """What ``optimizer`` keeps for the parameters of ``model``; those of others are left out."""
        states = {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}
        return cls(model, type(optimizer).__name__, states)

    def by_name(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """The state of each parameter of ``model`` that has any."""
        return {name: self.state[p] for name, p in model.named_parameters() if self.state.get(p)}

    def give_to(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Sets the state of those parameters of ``model`` that ``optimizer`` holds; its options stay as they are.

        Raises:
            PruneError: the optimiser is of another class.
        """
        if type(optimizer).__name__ != self.kind:
            raise PruneError(
                f"the state that is carried over is of {self.kind}, and this is {type(optimizer).__name__}: use one "
                "class of optimizer in all rounds, or do not carry it"
            )
        states = {model.get_parameter(name): state for name, state in self.by_name(model).items()}
        held = [p for group in optimizer.param_groups for p in group["params"]]
        given = optimizer.state_dict()
        given["state"] |= {index: states[p] for index, p in enumerate(held) if p in states}
        optimizer.load_state_dict(given)  # which brings values to the parameters' device and type

    def save(self, path: Path, model: nn.Module) -> None:
        """Writes tensors and JSON.

        Raises:
            PruneError: the state of a parameter holds anything but tensors and numbers.
        """
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for name, state in self.by_name(model).items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{key}:{name}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
                elif value is None or isinstance(value, int | float | str):
                    numbers[f"{key}:{name}"] = value
                else:
                    raise PruneError(
                        f"{self.kind} keeps {key!r} of {name}, a {type(value).__name__}, which cannot be carried over: "
                        "do not carry this optimizer"
                    )
        # One key: safetensors writes several in any order, and the same state must give the same bytes.
        save_file(tensors, path, {"optimizer": json.dumps({"kind": self.kind, "numbers": numbers})})


def read_state(path: Path, model: nn.Module) -> OptimizerState | None:
    """What :meth:`OptimizerState.save` wrote, for a model with parameters of those names and shapes; None without."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["optimizer"])
        values = {key: file.get_tensor(key) for key in file.keys()} | header["numbers"]  # noqa: SIM118  (not a dict)
    states: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        item, _, name = key.partition(":")
        states.setdefault(name, {})[item] = value
    return OptimizerState(model, header["kind"], states)


class Carry:
    """``carry(optimizer)`` gives a new optimiser of ``model`` the state that the last round's ended with.

    That state was cut as the parameters were. What the optimiser has when training ends is what the next round gets.
    In the first round, where there is none yet, the optimiser stays as it is.

    Raises:
        PruneError: for a second optimiser, and for one of another class than in the last round.
    """

    def __init__(self, model: nn.Module, last: OptimizerState | None) -> None:
        self.model, self.last = model, last
        self.optimizer: Optimizer | None = None

    def __call__(self, optimizer: Optimizer) -> None:
        if self.optimizer is not None:
            raise PruneError("one optimizer a round can be carried over: put all parameters into groups of one")
        if self.last is not None:
            self.last.give_to(optimizer, self.model)
        self.optimizer = optimizer

    def state(self) -> OptimizerState | None:
        """For the next round."""
        return None if self.optimizer is None else OptimizerState.of(self.optimizer, self.model)
