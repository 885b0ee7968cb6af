"""Clocks: the one that work is timed by, and timing in turns, where spinning threads are in nobody's way."""

import time
from collections.abc import Iterator
from itertools import groupby

import pytest
import torch

from layers.clock import own_clock, seconds


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_everybody_runs_in_turn_and_warm_where_threads_may_spin(threads: int) -> None:
    calls: list[str] = []
    contestants = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = seconds(contestants, torch.device("cpu"), 0.05)
    turns = [(name, len(list(run))) for name, run in groupby(calls)]
    assert times.keys() == {"a", "b"}
    assert [name for name, _ in turns] == ["a", "b"] * (len(turns) // 2)
    assert len(turns) >= 6
    assert all((number > 1) == (threads > 1) for _, number in turns)


def test_cpu_time_counts_on_one_thread_unless_it_comes_in_ticks(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fine() -> float:
        return time.perf_counter()

    def ticks() -> float:
        return time.perf_counter() // 0.01 / 100

    monkeypatch.setattr(time, "process_time", fine)
    assert (own_clock(torch.device("cpu")) is fine) == (threads == 1)
    monkeypatch.setattr(time, "process_time", ticks)
    assert own_clock(torch.device("cpu")) is time.perf_counter
