"""Timing in turns: who follows a pool of threads is not timed while these still spin."""

from collections.abc import Iterator
from itertools import groupby

import pytest
import torch

from layers.inference.clock import seconds


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
