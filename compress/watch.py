"""Run a model on real data and look at chosen operators: the n-th operator of the run is the n-th of its trace.

Everything that is to be known of activations is gathered in this way, by :class:`Collector` objects in one pass.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.calibration import Calibration, batches
from compress.errors import CalibrationError, PruneError, first_line
from compress.recorder import Trace
from compress.sandbox import backends_outside, untouched, use_backends, visible_operators
from compress.stand_ins import ON_DEVICE, REAL
from compress.trace import ExampleInputs, as_arguments, describe, record

Look = Callable[[tuple[Any, ...], Mapping[str, Any], Any], None]
Shapes = tuple[torch.Size, ...]


# Called on a tensor of the same shape it changes no value: pooling to one pixel calls it where the pixels lie in a
# certain order in memory, which is the fast backends' choice and no other path.
RESTRIDE = torch.ops.aten.as_strided_.default


class OtherPathError(CalibrationError):
    """The model called other operators than its trace, or with other sizes."""

    def __init__(self, batch: int, func: Any) -> None:
        super().__init__(
            f"calibration batch {batch} takes another path through the model than its trace (operator {func}): "
            "a model whose operators depend on the data can only be judged by its weights (l1, l2)"
        )


class Watch(TorchDispatchMode):
    """Calls ``after[i](args, kwargs, result)`` when operator i of ``trace`` has run, ``before[i]`` before it runs."""

    def __init__(self, trace: Trace, batch: int, after: Mapping[int, Look], before: Mapping[int, Look] | None = None):
        super().__init__()
        self._names = [op.func for op in trace.evaluation]
        self._batch, self._after, self._before = batch, after, before or {}
        self._onednn, self._cudnn = backends_outside()
        self._index = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func is not self._expected and RESTRIDE in (func, self._expected):
            if func is RESTRIDE and list(args[1]) == list(args[0].shape):
                return func(*args, **kwargs)
            self._index += 1
        index = self._index
        if index >= len(self._names) or self._names[index] is not func:
            raise OtherPathError(self._batch, func)
        self._index += 1
        if look := self._before.get(index):
            look(args, kwargs, None)
        # the fast backends are off for the choice of operators only: an operator that was chosen may use them
        use_backends(onednn=self._onednn, cudnn=self._cudnn)
        try:
            result = func(*args, **kwargs)
        finally:
            use_backends(onednn=False, cudnn=False)
        if look := self._after.get(index):
            look(args, kwargs, result)
        return result

    @property
    def _expected(self) -> Any:
        return self._names[self._index] if self._index < len(self._names) else None


class Looks:
    """What looks at the operators of one trace, by index; several functions may look at one operator."""

    def __init__(self) -> None:
        self.before: dict[int, Look] = {}
        self.after: dict[int, Look] = {}

    def add_before(self, index: int, look: Look) -> None:
        """Look at operator ``index`` before it runs."""
        self._add(self.before, index, look)

    def add_after(self, index: int, look: Look) -> None:
        """Look at operator ``index`` when it has run."""
        self._add(self.after, index, look)

    @staticmethod
    def _add(looks: dict[int, Look], index: int, look: Look) -> None:
        first = looks.get(index)

        def both(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
            assert first is not None
            first(args, kwargs, result)
            look(args, kwargs, result)

        looks[index] = look if first is None else both


class Collector(Protocol):
    """Gathers something about activations from all batches of calibration data."""

    def watch(self, trace: Trace, looks: Looks) -> None:
        """Say what to look at in runs with the operators of ``trace``: asked once, before the first of them."""

    def begin(self, batch: int, inputs: ExampleInputs) -> None:
        """A run on batch number ``batch`` follows."""

    def result(self) -> Any:
        """What was gathered, when all batches have run."""


def gather(
    model: nn.Module, trace: Trace, calibration: Calibration, makers: Iterable[Callable[[], Collector]]
) -> list[Any]:
    """The results of new collectors, one of each maker, after one pass over ``calibration`` in evaluation mode.

    Args:
        trace: of the model, on inputs of any size. Where operators decompose differently at the size of a batch, the
            pass begins again with a trace of each size.

    Raises:
        CalibrationError: batches of the wrong form or shape, activations that are not finite, or operators that depend
            on the data. Says in which batch.
    """
    makers = list(makers)
    with untouched(model):
        model.eval()
        try:
            return _pass(model, calibration, [make() for make in makers], trace)
        except OtherPathError:
            return _pass(model, calibration, [make() for make in makers], None)


def _pass(model: nn.Module, calibration: Calibration, collectors: list[Collector], trace: Trace | None) -> list[Any]:
    plans: dict[Shapes | None, tuple[Trace, Looks]] = {}
    for batch, (inputs, _) in enumerate(batches(calibration, model)):
        shapes = None if trace is not None else _shapes(inputs)
        if shapes not in plans:
            plans[shapes] = trace or _trace_of(model, inputs, batch), Looks()
            for collector in collectors:
                collector.watch(*plans[shapes])
        for collector in collectors:
            collector.begin(batch, inputs)
        _run(model, inputs, *plans[shapes], batch)
    return [collector.result() for collector in collectors]


def _run(model: nn.Module, inputs: ExampleInputs, trace: Trace, looks: Looks, batch: int) -> None:
    args, kwargs = as_arguments(inputs)
    watch = Watch(trace, batch, looks.after, looks.before)
    try:  # (in inference mode some operators are not taken apart)
        with torch.inference_mode(False), torch.no_grad(), visible_operators(), watch:
            model(*args, **kwargs)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"calibration data (batch {batch}) do not fit the model: on {describe(inputs)} it fails with "
            f"{first_line(error)!r}"
        ) from error


def traced(model: nn.Module, inputs: Iterable[ExampleInputs]) -> Iterator[tuple[Any, Trace]]:
    """Each batch with a trace of its shape: operators may decompose differently at another size."""
    traces: dict[Shapes, Trace] = {}
    for number, batch in enumerate(inputs):
        shapes = _shapes(batch)
        if shapes not in traces:
            traces[shapes] = _trace_of(model, batch, number)
        yield batch, traces[shapes]


def _shapes(inputs: ExampleInputs) -> Shapes:
    return tuple(leaf.shape for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


def _trace_of(model: nn.Module, inputs: ExampleInputs, batch: int) -> Trace:
    """With the operators that a run on these inputs calls."""
    try:
        trace = record(model, inputs, training=False, stand_ins=ON_DEVICE)
        return trace if _is_path(trace, model, inputs, batch) else record(model, inputs, training=False, stand_ins=REAL)
    except CalibrationError:
        raise
    except PruneError as error:
        raise CalibrationError(f"calibration data (batch {batch}) do not fit the model: {error}") from error


def _is_path(trace: Trace, model: nn.Module, inputs: ExampleInputs, batch: int) -> bool:
    """Whether the model calls these operators: some models look at data, or ask whether they are being traced."""
    try:
        with untouched(model):
            _run(model.eval(), inputs, trace, Looks(), batch)
    except OtherPathError:
        return False
    return True
