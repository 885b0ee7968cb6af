"""History, curve and events say what the records say, once."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from compress.report import RoundRecord, write_events, write_history


def _record(index: int) -> RoundRecord:
    return RoundRecord(
        round=index,
        accuracy=0.9 - index / 30,
        params=1000 - 300 * index,
        macs=5000 - 2000 * index,
        bytes=4000 - 1200 * index,
        latency_seconds=0.001 / 3,
        target=1 - index / 3,
        metrics={"digit": 0.9, "even": 0.9 - index / 15},
        kept={"conv1": (8 - index, 8), "conv2": (16, 16)},
        test=0.8 - index / 30,
    )


def test_a_record_survives_json() -> None:
    assert RoundRecord.from_json(_record(1).to_json()) == _record(1)


def test_history_holds_every_round(tmp_path: Path) -> None:
    records = [_record(0), _record(1)]
    write_history(tmp_path, records)
    history = json.loads((tmp_path / "history.json").read_text())
    assert list(history) == ["rounds"]
    assert history["rounds"][1]["round"] == 1
    assert history["rounds"][1]["accuracy"] == records[1].accuracy
    assert {"params", "macs", "latency_seconds"} <= history["rounds"][0].keys()
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [record.accuracy for record in records]
    assert [float(row["test"]) for row in rows] == [record.test for record in records]
    assert [int(row["macs"]) for row in rows] == [5000, 3000]


def test_the_curve_is_a_picture_of_readable_size(tmp_path: Path) -> None:
    write_history(tmp_path, [_record(0)])
    write_history(tmp_path, [_record(0), _record(1), _record(2)])
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width >= 1000
        assert np.asarray(picture.convert("L")).std() > 5  # not blank
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "history.csv", "history.json"]


def test_events_appear_once_however_often_they_are_written(tmp_path: Path) -> None:
    scores = {"group": np.array([0.1, 0.5, np.inf]), "empty": np.array([])}
    for index in (0, 1, 0, 1):
        write_events(tmp_path, _record(index), scores)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    for tag, expected in {
        "accuracy": [0.9, 0.9 - 1 / 30],
        "params": [1000, 700],
        "macs": [5000, 3000],
        "latency_seconds": [0.001 / 3] * 2,
        "metrics/digit": [0.9, 0.9],
        "metrics/even": [0.9, 0.9 - 1 / 15],
        "test": [0.8, 0.8 - 1 / 30],
        "kept/conv1": [1, 7 / 8],
        "kept/conv2": [1, 1],
    }.items():
        assert [event.step for event in events.Scalars(tag)] == [0, 1]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(expected)
    histograms = events.Histograms("scores/group")
    assert [event.step for event in histograms] == [0, 1]
    assert histograms[0].histogram_value.num == 2  # the infinite score is left out
    assert "scores/empty" not in events.Tags()["histograms"]


def test_writing_changes_no_random_state(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    write_history(tmp_path, [_record(0)])
    write_events(tmp_path, _record(0), {})
    assert torch.equal(torch.get_rng_state(), before)
