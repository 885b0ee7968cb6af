"""What can go wrong for a user of :mod:`compress`: every message names the thing, the reason and the remedy."""


class PruneError(ValueError):
    """A model, an option or an input that cannot be worked with as given."""


class TraceError(PruneError):
    """The model could not be run on its example inputs, or what ran cannot be analysed."""


class BudgetError(PruneError):
    """A budget outside its range, or below the smallest model that the options allow: ``smallest``, where known."""

    def __init__(self, message: str, smallest: float | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest


class CalibrationError(PruneError):
    """Calibration data that are missing, of the wrong form, or cannot be iterated more than once."""


class ArtifactError(PruneError):
    """A saved artefact that cannot be read, or that belongs to another model."""


class CheckpointError(PruneError):
    """A checkpoint that cannot be read safely, or that does not fit the model."""


def first_line(error: BaseException) -> str:
    """What went wrong in one line, for a message that quotes it; the name of the error where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
