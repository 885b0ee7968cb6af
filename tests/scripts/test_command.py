"""Flags and YAML become a config, and bad input becomes one line and status 2."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from scripts.command import run_command


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part.

    Args:
        macs: a fraction
    """

    macs: float | None = None

    def __post_init__(self) -> None:
        if self.macs is not None and not 0 < self.macs <= 1:
            raise ValueError(f"macs is {self.macs}, but it must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Do something.

    Args:
        model: what with
        budget: how far
    """

    model: str
    budget: Part = field(default_factory=Part)
    mean: list[float] | None = None
    std: list[float] | None = None
    batch_size: int = 128
    lr: float | None = None
    recover: bool = False


def _run(*argv: str) -> Config | int:
    seen: list[Config] = []
    status = run_command(seen.append, Config, "do", argv)
    return seen[0] if seen else status


@pytest.mark.parametrize(
    "mean",
    [
        ("--mean", "0.5", "0.25", "1"),
        ("--mean", "0.5,0.25,1"),
        ("--mean=0.5,0.25,1",),
        ("--mean", "[0.5, 0.25, 1]"),
        ("--mean=[0.5, 0.25, 1]",),
    ],
)
def test_lists_can_be_written_in_any_natural_way(mean: tuple[str, ...]) -> None:
    assert _run("--model", "a", *mean, "--std", "1", "2", "3") == Config(model="a", mean=[0.5, 0.25, 1], std=[1, 2, 3])


def test_flags_have_dashes_or_underscores_and_switches_need_no_value() -> None:
    expected = Config(model="a-b", batch_size=3, recover=True, lr=-0.5)
    assert _run("--model", "a-b", "--batch-size", "3", "--recover", "--lr", "-0.5") == expected
    assert _run("--recover", "--model=a-b", "--batch_size=3", "--lr=-0.5") == expected
    assert _run("--model", "a", "--recover", "false") == Config(model="a")


def test_flags_after_a_config_file_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: a\nbudget:\n  macs: 0.5\nmean: [0.5]\nbatch_size: 3\n")
    expected = Config(model="a", budget=Part(macs=0.25), mean=[0.5], batch_size=3)
    assert _run("--config", str(file), "--budget.macs", "0.25") == expected


def test_the_printed_config_gives_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ("--model", "a", "--budget.macs", "0.5", "--mean", "1", "2", "--recover")
    with pytest.raises(SystemExit) as exit_:
        _run(*flags, "--print_config")
    assert exit_.value.code == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert _run("--config", str(tmp_path / "run.yaml")) == _run(*flags)


def test_help_shows_flags_with_dashes_and_what_they_mean(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        _run("--help")
    text = capsys.readouterr().out
    for part in ("Do something.", "--batch-size", "--budget.macs", "what with", "a fraction"):
        assert part in text
    assert "--batch_size" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "do: these flags are required: --model"),
        (("--model", "a", "--batch-size", "many"), "do: --batch-size cannot be 'many'"),
        (("--model", "a", "--lr", "fast"), "do: --lr cannot be 'fast'"),
        (("--model", "a", "--mean", "x", "y"), "do: --mean cannot be"),
        (("--model", "a", "--no-such", "3"), "do: there is no flag --no-such=3; see --help"),
        (("--model", "a", "--budget.macs", "1.5"), "do: macs is 1.5, but it must be in (0, 1]"),
        (("--model", "a", "--config", "none.yaml"), "none.yaml"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(argv: tuple, message: str, capsys: pytest.CaptureFixture) -> None:
    assert _run(*argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bad\nthing"), FileNotFoundError(2, "No such file", "a.pt")])
def test_errors_of_the_run_are_one_line_and_status_2(error: Exception, capsys: pytest.CaptureFixture) -> None:
    def fail(config: Config) -> None:
        raise error

    assert run_command(fail, Config, "do", ["--model", "a"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_defect_keeps_its_traceback() -> None:
    def fail(config: Config) -> None:
        raise KeyError("defect")

    with pytest.raises(KeyError):
        run_command(fail, Config, "do", ["--model", "a"])
