import dataclasses
import json

from mtl import Epoch, History

ROWS = tuple(Epoch(number, 0.1, {"a": 1 / number}, {"a": 0.5}, {}, {}, 1.0) for number in (1, 2, 3))


def test_json_round_trip_is_exact() -> None:
    history = History(ROWS)
    assert History.from_json(json.loads(json.dumps(history.to_json()))) == history
    assert history[-1].loss["a"] == 1 / 3
    assert history[:2] == ROWS[:2]
    assert len(history) == 3


def test_wall_time_is_no_result() -> None:
    slower = tuple(dataclasses.replace(row, seconds=9.0) for row in ROWS)
    assert History(slower) == History(ROWS)
    assert History(ROWS[:2]) != History(ROWS)
