"""Everything about a training run that has a sensible default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from mtl.sampling import Sampling

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "onecycle", "constant"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Switch = Literal["auto", "on", "off"]
Keep = Literal["last", "best"]
OnNan = Literal["stop", "skip"]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of ``mtl.fit``.

    Args:
        optimizer: "sgd" or "adamw"
        lr: peak learning rate, > 0; default 0.05 for sgd and 0.001 for adamw
        momentum: of sgd, in [0, 1)
        nesterov: Nesterov's form of sgd's momentum
        weight_decay: >= 0; on weights only, never on biases and norm parameters (those with at most one axis)
        schedule: learning rate over the steps: "cosine" to 0, "onecycle" (up for 30 %, then down), or "constant"
        warmup_epochs: linear rise at the start, in epochs (fractions allowed), >= 0; "onecycle" has its own
        label_smoothing: in [0, 1); for tasks whose loss is ``nn.CrossEntropyLoss``, in training only
        ema_decay: in (0, 1), such as 0.999 a step: the model ends with the exponential moving average of its weights
            and buffers; default: no average
        task_lr: factor on the learning rate of what belongs to one task alone, by task, > 0
        accumulate: batches whose mean gradient makes one step, >= 1
        sampling: how often each task is seen where every task has data of its own; see ``mtl.sampling.num_batches``.
            An epoch has as many batches as all tasks' data together: "proportional" shows every sample once, "uniform"
            shows all tasks equally often and repeats small data sets, "sqrt" is in between. Without effect where one
            data set has all labels: an epoch is every batch once
        patience: stop after so many epochs without a better validation score, >= 1; default: never
        monitor: the task whose metric is the validation score; default: the mean over tasks, of metrics of which more
            is better as they are, and of others as a fraction of the first epoch's, negated
        keep: "last", or "best": the model ends with the weights of the epoch with the best validation score
        on_nan: what to do where a task's loss is not finite: "stop" with an error that names task and batch, or "skip"
            that task in that batch
        reference: metric of each task to compare with in ``History`` and TensorBoard, such as that of single-task
            training: see ``mtl.delta_m``
        max_grad_norm: clip the gradient to this 2-norm, > 0; default: no clipping
        precision: of the forward pass in training. "auto" is bf16 on CUDA, and on a CPU with bf16 instructions for
            models with convolutions; else fp32. Evaluation is always in the model's own precision
        channels_last: memory layout of convolutions while training; "auto" is on for models with convolutions
        seed: of the order of the data, augmentation and dropout, >= 0
        device: "auto" (an accelerator if there is one), "cpu", "cuda", "cuda:1", ...
        num_threads: CPU threads of PyTorch during the run, >= 1; default: leave as it is
        progress: a progress bar and a line per epoch, where the output is a terminal

    Raises:
        ValueError: for a value out of its range.
    """

    optimizer: Optimizer = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    max_grad_norm: float | None = None
    task_lr: Mapping[str, float] | None = None
    accumulate: int = 1
    sampling: Sampling = "proportional"
    patience: int | None = None
    monitor: str | None = None
    keep: Keep = "last"
    on_nan: OnNan = "stop"
    reference: Mapping[str, float] | None = None
    precision: Precision = "auto"
    channels_last: Switch = "auto"
    seed: int = 0
    device: str = "auto"
    num_threads: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, kind in (
            ("optimizer", Optimizer),
            ("schedule", Schedule),
            ("precision", Precision),
            ("channels_last", Switch),
            ("sampling", Sampling),
            ("keep", Keep),
            ("on_nan", OnNan),
        ):
            choices = get_args(kind)
            _require(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")
        _require(self.lr is None or 0 < self.lr < math.inf, "lr", self.lr, "a number above 0")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        _require(
            self.momentum > 0 or not self.nesterov or self.optimizer != "sgd",
            "nesterov",
            True,
            "False without momentum",
        )
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "a number >= 0")
        _require(0 <= self.warmup_epochs < math.inf, "warmup_epochs", self.warmup_epochs, "a number >= 0")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        _require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "in (0, 1)")
        _require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0")
        for task, factor in (self.task_lr or {}).items():
            _require(0 < factor < math.inf, f"task_lr of {task!r}", factor, "a number above 0")
        _require(self.accumulate >= 1, "accumulate", self.accumulate, "at least 1")
        _require(self.patience is None or self.patience >= 1, "patience", self.patience, "at least 1")
        _require(self.seed >= 0, "seed", self.seed, "an integer >= 0")
        _require(self.num_threads is None or self.num_threads >= 1, "num_threads", self.num_threads, "at least 1")

    @property
    def peak_lr(self) -> float:
        """The learning rate to use: ``lr``, or the optimizer's default."""
        if self.lr is not None:
            return self.lr
        return 0.05 if self.optimizer == "sgd" else 1e-3


def _require(valid: bool, name: str, value: object, range_: str) -> None:
    if not valid:
        raise ValueError(f"{name} is {value!r}, but it must be {range_}")
