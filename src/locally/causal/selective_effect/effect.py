"""What an estimator of an effect returns: the figure, its error, its status, and a table to read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.special import ndtr, ndtri

from locally.checks import check_positive


class Status(StrEnum):
    """Whether an effect can be trusted; set by the estimator, read from `Effect.status`."""

    IDENTIFIED = "identified"
    WEAK = "weakly identified: the variance of the treatment hardly differs between the instrument's arms"
    NOT_CONVERGED = "not converged: a logistic model has no finite maximum or its steps ran out"
    SINGULAR = "singular: the working models' equations have no unique solution"


@dataclass(frozen=True)
class Effect:
    """An average treatment effect in units of the outcome.

    Attributes:
        estimate, standard_error: NaN where `status` says that there is none.
        scores: (repetitions, n), one influence value a unit; the estimate is the median over repetitions of the means.
        status: whether the estimate can be trusted.
        label: what was estimated, for tables.
    """

    estimate: float
    standard_error: float
    scores: Float[ndarray, "repetitions n"] = field(repr=False)
    status: Status = Status.IDENTIFIED
    label: str = "effect"

    @classmethod
    def from_scores(cls, scores: Float[ndarray, "repetitions n"], status: Status, label: str) -> "Effect":
        """Median over repeated splits; the variance adds how far each repetition lies from it."""
        estimates = scores.mean(axis=1)
        estimate = np.median(estimates)
        variances = scores.var(axis=1) / scores.shape[1] + (estimates - estimate) ** 2
        return cls(float(estimate), float(np.sqrt(np.median(variances))), scores, status, label)

    @property
    def t_statistic(self) -> float:
        """Estimate over standard error."""
        return self.estimate / self.standard_error

    @property
    def p_value(self) -> float:
        """Two-sided, of no effect, by the normal law."""
        return float(2 * ndtr(-abs(self.t_statistic)))

    def confint(self, level: float = 0.95) -> tuple[float, float]:
        """Normal confidence interval; `level` in (0, 1)."""
        check_positive("level", level, below=1)
        half = float(ndtri((1 + level) / 2)) * self.standard_error
        return self.estimate - half, self.estimate + half

    def summary(self, level: float = 0.95) -> "Table":
        """One row: estimate, standard error, t, p-value and the bounds at this level, in (0, 1)."""
        low, high = self.confint(level)
        tail = 50 * (1 - level)
        header = ("coef", "std err", "t", "P>|t|", f"{tail:.3g} %", f"{100 - tail:.3g} %")
        row = (self.estimate, self.standard_error, self.t_statistic, self.p_value, low, high)
        return Table(header, ((self.label, row),))


@dataclass(frozen=True)
class Table:
    """Rows of figures under a header: prints as text, shows as HTML in a notebook, turns into a data frame."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]

    def __str__(self) -> str:
        cells = [["", *self.header], *([name, *map(_figure, row)] for name, row in self.rows)]
        widths = [max(len(line[j]) for line in cells) for j in range(len(cells[0]))]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]) for line in cells
        )

    def _repr_html_(self) -> str:
        from html import escape

        def line(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(line("td", [name, *map(_figure, row)]) for name, row in self.rows)
        return f"<table>{line('th', ['', *self.header])}{body}</table>"

    def to_frame(self) -> Any:
        """As a pandas data frame.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise ImportError("to_frame needs pandas: pip install pandas") from None
        return pandas.DataFrame([row for _, row in self.rows], [name for name, _ in self.rows], self.header)


def _figure(value: float) -> str:
    return f"{value:.6g}" if np.isfinite(value) else str(value)
