import types
from pathlib import Path

import pytest

from benchmarks.common import Timing, interleaved, stopwatch, write_results


def test_contestants_take_turns_and_the_first_turn_is_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.common.gc.collect", lambda: 0)  # half a second each
    turns: list[str] = []

    def contestant(name: str, seconds: list[float]) -> dict[str, float]:
        turns.append(name)
        return {"step": seconds.pop(0)}

    slow, quick = [100.0, 5.0, 3.0, 4.0], [100.0, 1.0, 2.0, 9.0]
    found = interleaved({"a": lambda: contestant("a", slow), "b": lambda: contestant("b", quick)}, repeats=3)
    assert turns == ["a", "b"] * 4
    assert found == {"a": Timing({"step": 100.0}, {"step": 4.0}), "b": Timing({"step": 100.0}, {"step": 2.0})}


def test_stopwatch_counts_calls_and_puts_the_functions_back() -> None:
    def double(x: int) -> int:
        return 2 * x

    module = types.SimpleNamespace(double=double)
    with stopwatch({"doubling": (module, "double")}) as seconds:
        assert module.double(3) == 6
    assert module.double is double
    assert 0 < seconds["doubling"] <= seconds["total"]


def test_stopwatch_refuses_a_function_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="gone"), stopwatch({"stage": (types.SimpleNamespace(), "gone")}):
        pass


def test_results_name_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "bench_x.json"
    write_results(path, ["--data", f"imagefolder:{tmp_path}/cifar10", "--folder=/some/where", "--macs", "0.5"], {})
    text = path.read_text()
    assert '"python benchmarks/bench_x.py --data imagefolder:cifar10 --folder=where --macs 0.5"' in text
    assert str(tmp_path) not in text
    assert list(tmp_path.iterdir()) == [path]
