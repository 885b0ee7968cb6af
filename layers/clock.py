"""How long something takes, on a machine that may be busy with other things."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def wait(device: torch.device) -> None:
    """Until the work that was given to ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def own_clock(device: torch.device) -> Callable[[], float]:
    """The clock of work on ``device``: CPU time of this process where one thread does it all, else that on the wall.

    On one thread CPU time is that on the wall of an idle machine, and means something on a busy one too. Some systems
    count it in ticks of some milliseconds, in which short work takes none or a whole tick: there the wall's is used.
    """
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if one_thread and _moves(time.process_time) else time.perf_counter


def _moves(clock: Callable[[], float]) -> bool:
    """Whether readings one after the other differ."""
    return all(clock() != clock() for _ in range(5))


# Threads of a pool wait for work by spinning, for a while: with several of them the one before would be in the way.
_SETTLING = 0.02


def seconds(contestants: Mapping[str, Callable[[], object]], device: torch.device, budget: float) -> dict[str, float]:
    """The median over runs in turn, so that what disturbs the machine meets all alike.

    ``budget`` is the seconds that all may take together; everybody runs at least 3 and at most 200 times.
    """
    runs: dict[str, list[float]] = {name: [] for name in contestants}
    stop = time.perf_counter() + budget
    clock = own_clock(device)
    settles = device.type == "cpu" and torch.get_num_threads() > 1
    for turn in range(200):
        if turn >= 3 and time.perf_counter() > stop:
            break
        for name, run in contestants.items():
            if settles:
                _settle(run)
            wait(device)
            begin = clock()
            run()
            wait(device)
            runs[name].append(clock() - begin)
    return {name: median(times) for name, times in runs.items()}


def _settle(run: Callable[[], object]) -> None:
    """Run untimed, once at least."""
    stop = time.perf_counter() + _SETTLING
    while True:
        run()
        if time.perf_counter() > stop:
            return
