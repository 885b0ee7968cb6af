"""How much of a model may stay."""

from dataclasses import dataclass, fields

from compress.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """The fraction that is KEPT, in (0, 1], of exactly one of the four metrics.

    ``channels`` counts removable channels (units of the channel graph), ``params`` parameters, ``macs``
    multiply-accumulates of one forward pass, ``latency`` its seconds, measured on this machine beside the dense model.

    >>> Budget(macs=0.5).metric, Budget(macs=0.5).fraction
    ('macs', 0.5)
    """

    macs: float | None = None
    params: float | None = None
    channels: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise BudgetError(
                f"a budget takes exactly one of macs, params, channels, latency; given: {', '.join(given) or 'none'}"
            )
        ((name, value),) = given.items()
        if not 0 < value <= 1:
            raise BudgetError(f"budget {name}={value} is the fraction that is kept: it must be above 0 and at most 1")

    @property
    def metric(self) -> str:
        """The name of the metric."""
        return next(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @property
    def fraction(self) -> float:
        """The fraction of the metric that is kept."""
        return float(getattr(self, self.metric))
