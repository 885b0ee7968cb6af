"""Dropout: the expectation of both scalings, and what shares a draw."""

import math

import pytest
import torch

from layers import Dropout

SHAPE = (40, 30, 50)
PER = ["element", "channel", "time"]


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("scale_at", ["train", "test"])
def test_training_has_the_expectation_of_inference(scale_at: str, per: str) -> None:
    p = 0.3
    layer = Dropout(p, scale_at=scale_at, per=per)
    x = torch.rand(SHAPE, dtype=torch.float64) + 0.5
    draws, rounds = {"element": x.numel(), "channel": 40 * 30, "time": 40 * 50}[per], 20
    mean = torch.stack([layer.train()(x).mean() for _ in range(rounds)]).mean()
    # one draw decides over x.numel() / draws values, whose mean is near 1: deviation of kept-or-not times its scale
    scale = 1 / (1 - p) if scale_at == "train" else 1.0
    deviation = 1.2 * scale * math.sqrt(p * (1 - p) / (draws * rounds))
    expected = layer.eval()(x).mean()
    assert abs(float(mean - expected)) < 3 * deviation
    assert float(expected) == pytest.approx(float(x.mean()) * (1 if scale_at == "train" else 1 - p))


@pytest.mark.parametrize("scale_at", ["train", "test"])
@pytest.mark.parametrize("per", PER)
def test_what_is_kept_is_scaled_and_shared(per: str, scale_at: str) -> None:
    x = torch.ones(SHAPE)
    y = Dropout(0.4, scale_at=scale_at, per=per)(x)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.6 if scale_at == "train" else 1])
    shared = {"element": None, "channel": 2, "time": 1}[per]
    along = [axis for axis in range(3) if bool((y == y.narrow(axis, 0, 1)).all())]
    assert along == ([] if shared is None else [shared])


def test_no_dropout_is_the_identity() -> None:
    x = torch.randn(3, 4)
    for layer in (Dropout(0.0), Dropout(0.0, scale_at="test"), Dropout(0.5).eval()):
        assert torch.equal(layer(x), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dropout(1.0), r"Dropout: p must be in \[0, 1\), but is 1.0"),
        (lambda: Dropout(-0.1), r"p must be in \[0, 1\)"),
        (lambda: Dropout(scale_at="inference"), "scale_at must be one of 'train', 'test', but is 'inference'"),
        (lambda: Dropout(per="row"), "per must be one of 'element', 'channel', 'time', but is 'row'"),
        (lambda: Dropout(per="time")(torch.ones(3, 4)), r"x must have shape \(batch, time, features\).*\(3, 4\)"),
        (lambda: Dropout(per="channel")(torch.ones(3, 4)), r"x must have shape \(batch, channels, \*, .*\(3, 4\)"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
