"""When to warn."""

from dataclasses import dataclass, fields


class MonitorWarning(UserWarning):
    """A threshold is passed."""


@dataclass(frozen=True)
class Thresholds:
    """What is normal. None of a field: never warn of that.

    Raises:
        TypeError: a field is neither a number nor None.
    """

    underflow: float | None = 0.05
    """The largest share of values that become zero."""
    saturation: float | None = 0.25
    """The largest share of values at the largest code."""
    sqnr_db: float | None = 25.0
    """The smallest SQNR, in dB; E4M3 leaves 28 to 32."""
    amax_drift: float | None = 4.0
    """The largest change of amax, as a power of two, against what it was."""
    not_finite: float | None = 0.0
    """The largest share of values of an operand that are NaN or infinite. A result that is not finite is always
    reported."""
    dead_after: int | None = 3
    """An expert is dead if it had no token in this many readings, one after the other."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"Thresholds.{entry.name} is {value!r}; it must be a number, or None to never warn")

    def passed_by(self, statistic: str, value: float) -> str | None:
        """Which way `value` passes the threshold of `statistic`, in words that end with the threshold."""
        limit = getattr(self, statistic, None)
        if limit is None:
            return None
        if statistic == "sqnr_db":
            return f"below {limit:g}" if value < limit else None
        if statistic == "amax_drift":
            return f"more than {limit:g} powers of two away" if abs(value) > limit else None
        return f"above {limit:g}" if value > limit else None


@dataclass(frozen=True)
class Alert:
    """A threshold that is passed, or a result that is not finite."""

    step: int
    layer: str
    """Empty if it is of all."""
    subject: str
    """An operand or a result, or `experts`."""
    statistic: str
    """As the field of `Thresholds`; `result` for a result that is not finite, `unseen` where no layer was seen."""
    message: str
    """One sentence that begins with the layer, if it is of one."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is about; of each, there is one warning until it is over."""
        return self.layer, self.subject, self.statistic
