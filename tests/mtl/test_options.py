import pytest

from mtl import FitOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "sdg"),
        ("schedule", "step"),
        ("precision", "fp8"),
        ("channels_last", "yes"),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("warmup_epochs", -1.0),
        ("label_smoothing", 1.0),
        ("ema_decay", 1.0),
        ("max_grad_norm", 0.0),
        ("seed", -1),
        ("num_threads", 0),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .* must be"):
        FitOptions(**{name: value})  # type: ignore[arg-type]


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov"):
        FitOptions(momentum=0.0)
    assert FitOptions(momentum=0.0, nesterov=False).peak_lr == 0.05
    assert FitOptions(optimizer="adamw").peak_lr == 1e-3
