"""Many batches go through a model together, operator by operator: what one layer learns, the next one already sees.

Each batch runs in a thread of its own, but never two at a time: a thread runs until it pauses, and then waits to be
resumed. So a layer's weights can be solved for from all batches and replaced in the middle of a forward pass, and the
whole model is worked through in one pass over the data.
"""

import threading
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.sandbox import unwrapped
from compress.surgery import copied
from compress.trace import ExampleInputs, as_arguments


class _Abandoned(BaseException):
    """Ends the thread of a run that nobody will resume."""


class Run:
    """One forward pass under the mode that ``mode`` makes, paused by what that calls."""

    def __init__(self, model: nn.Module, inputs: ExampleInputs, mode: Callable[[], TorchDispatchMode]) -> None:
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._model = copied(unwrapped(model), shared).eval()  # modules may keep something of a run: each has its own
        self._inputs, self._mode = inputs, mode()
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._abandoned = False
        self.finished = False
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Go on until the next pause, or the end; what went wrong there is raised here."""
        if self.finished:
            return
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """Called from the run: wait until resumed."""
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """End the run where it is."""
        if not self.finished:
            self._abandoned = True
            self._go.release()
        self._thread.join()

    def _main(self) -> None:
        self._go.acquire()
        args, kwargs = as_arguments(self._inputs)
        try:
            if not self._abandoned:
                with torch.no_grad(), self._mode:
                    self._model(*args, **kwargs)
        except _Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001  (raised where the run is resumed)
            self._error = error
        finally:
            self.finished = True
            self._stopped.release()
