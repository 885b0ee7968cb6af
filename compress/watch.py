"""Run a model on real data and look at chosen operators: the n-th operator of the run is the n-th of its trace."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from compress.errors import CalibrationError
from compress.recorder import Trace
from compress.sandbox import quick_operators

Look = Callable[[tuple[Any, ...], Mapping[str, Any], Any], None]


class Watch(TorchDispatchMode):
    """Calls ``after[i](args, kwargs, result)`` when operator i of ``trace`` has run, ``before[i]`` before it runs."""

    def __init__(self, trace: Trace, batch: int, after: Mapping[int, Look], before: Mapping[int, Look] | None = None):
        super().__init__()
        self._names = [op.func for op in trace.evaluation]
        self._batch, self._after, self._before = batch, after, before or {}
        self._index = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        index = self._index
        expected = self._names[index] if index < len(self._names) else None
        if expected is None or expected is not func:
            raise CalibrationError(
                f"calibration batch {self._batch} takes another path through the model than its trace (operator "
                f"{func}): a model whose operators depend on the data can only be judged by its weights (l1, l2)"
            )
        self._index += 1
        if look := self._before.get(index):
            look(args, kwargs, None)
        with quick_operators():
            result = func(*args, **kwargs)
        if look := self._after.get(index):
            look(args, kwargs, result)
        return result
