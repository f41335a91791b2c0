"""How far the data carry the estimate, and how much of what cannot be tested it takes to overturn it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.special import ndtri

from locally.causal.selective_effect.effect import Effect, Status, Table
from locally.causal.selective_effect.influence import WorkingValues
from locally.causal.selective_effect.observations import Observations
from locally.checks import check_finite, check_positive

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Overlap:
    """Propensities, variance gap and weights over all rows (and repetitions).

    Attributes:
        z, pi: instrument and P(Z = 1 | X), clipped.
        p: P(A = 1 | Z = z, X), row z (mean of A where it is not binary).
        variance_gap: v_1 - v_0, kept from zero.
        weight: |1 / (f(Z|X) (v_1 - v_0))|, what a row's residual product counts.
        n_trimmed: rows whose pi was clipped.
        n_stabilised: rows whose variance gap was replaced.
        effective_rows: (sum of weights)^2 / sum of squares; far below the rows where few of them decide.
        sign_changes: share of rows where the gap has the sign of the minority.
    """

    z: Float[ndarray, " rows"] = field(repr=False)
    pi: Float[ndarray, " rows"] = field(repr=False)
    p: Float[ndarray, "2 rows"] = field(repr=False)
    variance_gap: Float[ndarray, " rows"] = field(repr=False)
    weight: Float[ndarray, " rows"] = field(repr=False)
    n_trimmed: int
    n_stabilised: int
    effective_rows: float
    sign_changes: float

    def table(self) -> Table:
        """Quantiles of each."""
        columns = {
            "P(Z = 1 | X)": self.pi,
            "E[A | Z = 0, X]": self.p[0],
            "E[A | Z = 1, X]": self.p[1],
            "variance gap": self.variance_gap,
            "weight": self.weight,
        }
        header = tuple(f"{100 * q:g} %" for q in QUANTILES)
        return Table(header, tuple((k, tuple(np.quantile(v, QUANTILES).tolist())) for k, v in columns.items()))

    def plot(self) -> "Figure":
        """Histograms: propensity by arm, variance gap, weights."""
        from locally.plots import INK, PALETTE, canvas

        figure, (left, middle, right) = canvas(10.5, 3.4, ncols=3)
        bins = np.linspace(0, 1, 41)
        for arm in (0, 1):
            left.hist(self.pi[self.z == arm], bins, density=True, alpha=0.55, color=PALETTE[arm], label=f"Z = {arm}")
        left.set(xlabel="P(Z = 1 | X)", ylabel="density", title="Overlap of the instrument's arms")
        left.legend(labelcolor=INK)
        middle.hist(self.variance_gap, 40, color=PALETTE[2], alpha=0.7)
        middle.axvline(0, color=INK, lw=1)
        title = f"Identification: {self.n_stabilised} rows replaced"
        middle.set(xlabel="Var(A | Z = 1, X) - Var(A | Z = 0, X)", ylabel="rows", title=title)
        spread = np.geomspace(self.weight.min(), max(self.weight.max(), 1.001 * self.weight.min()), 41)
        right.hist(self.weight, spread, color=PALETTE[3], alpha=0.7)
        title = f"Weights: {self.effective_rows:.0f} effective of {self.weight.size} rows"
        right.set(xscale="log", xlabel="1 / (f(Z | X) |variance gap|)", ylabel="rows", title=title)
        return figure


@dataclass(frozen=True)
class Sensitivity:
    """Effect, standard error and interval over delta, how unlike confounding is in the two arms.

    Attributes:
        replaced: share of rows whose variance gap had to be replaced, as `overlap` counts them at delta = 0.
        robustness: the smallest |delta| of those asked at which the interval covers no effect; infinite if none does.

    Estimates are NaN where the tilted gap has changed its sign for most rows: there, nothing identifies the effect.
    """

    deltas: Float[ndarray, " k"]
    estimates: Float[ndarray, " k"]
    standard_errors: Float[ndarray, " k"]
    low: Float[ndarray, " k"]
    high: Float[ndarray, " k"]
    replaced: Float[ndarray, " k"]
    level: float

    @property
    def robustness(self) -> float:
        """The smallest |delta| of those asked at which the interval covers 0; infinite if none does."""
        covered = (self.low <= 0) & (self.high >= 0)
        return float(np.abs(self.deltas[covered]).min()) if covered.any() else float("inf")

    def table(self) -> Table:
        """One row for each delta: effect, standard error, interval and share of replaced rows."""
        header = ("coef", "std err", "low", "high", "replaced")
        rows = zip(self.deltas, self.estimates, self.standard_errors, self.low, self.high, self.replaced)
        return Table(header, tuple((f"delta = {d:+.3g}", tuple(float(v) for v in rest)) for d, *rest in rows))

    def plot(self) -> "Figure":
        """Effect and interval over delta, as a Matplotlib figure that is not registered with pyplot."""
        from locally.plots import INK, PALETTE, canvas

        figure, axes = canvas(6.4, 3.8)
        axes.plot(self.deltas, self.estimates, color=PALETTE[0], label="effect")
        label = f"{100 * self.level:g} % interval"
        axes.fill_between(self.deltas, self.low, self.high, color=PALETTE[0], alpha=0.18, lw=0, label=label)
        axes.axhline(0, color=INK, lw=1)
        axes.axvline(0, color=INK, lw=1, ls=":")
        title = "Effect if the instrument changes how strong confounding is"
        axes.set(xlabel="delta: (omega_1 - omega_0) / mean omega", ylabel="effect, units of the outcome", title=title)
        axes.legend(labelcolor=INK)
        return figure


def overlap(
    obs: Observations, values: Sequence[Sequence[tuple[float, WorkingValues]]], trim_z: float, trim_d: float
) -> Overlap:
    """Of the combination that counts most in each repetition."""
    kept = [mixture[0][1] for mixture in values]
    z = np.tile(obs.z, len(kept))
    pi = np.concatenate([v.pi for v in kept])
    gap = np.concatenate([v.D for v in kept])
    weight = np.concatenate([np.abs(v.instrument_weight(obs.z)) for v in kept])
    return Overlap(
        z,
        pi,
        np.concatenate([v.p for v in kept], axis=1),
        gap,
        weight,
        n_trimmed=int(((pi <= trim_z) | (pi >= 1 - trim_z)).sum()),
        n_stabilised=int((np.abs(gap) <= trim_d).sum()),
        effective_rows=float(weight.sum() ** 2 / (weight**2).sum()),
        sign_changes=float(min((gap > 0).mean(), (gap < 0).mean())),
    )


def sensitivity(
    obs: Observations,
    values: Sequence[Sequence[tuple[float, WorkingValues]]],
    deltas: Sequence[float] | Float[ndarray, " k"] | None,
    level: float,
    trim_d: float,
) -> Sensitivity:
    """Tilted scores over delta; the median over repetitions, as for the effect itself. O(k n)."""
    check_positive("level", level, below=1)
    grid = np.linspace(-0.5, 0.5, 41) if deltas is None else np.asarray(deltas, dtype=np.float64)
    check_finite("deltas", grid)
    if grid.ndim != 1 or grid.size == 0 or np.abs(grid).max() > 2:
        raise ValueError("deltas must be a non-empty sequence of numbers in [-2, 2]")
    sign = np.sign(np.median(np.concatenate([mixture[0][1].D for mixture in values])))
    estimates, errors, replaced = (np.full(grid.size, np.nan) for _ in range(3))
    for i, delta in enumerate(grid.tolist()):
        scores, gaps = np.zeros((len(values), obs.n)), np.empty((len(values), obs.n))
        for r, mixture in enumerate(values):
            for w, v in reversed(mixture):  # the heaviest comes last and leaves its gap
                of_one, gaps[r] = v.tilted(obs.z, obs.a, obs.y, delta, trim_d)
                scores[r] += w * of_one
        replaced[i] = (np.abs(gaps) <= trim_d).mean()
        if np.sign(np.median(gaps)) == sign:
            effect = Effect.from_scores(scores, Status.IDENTIFIED, "effect")
            estimates[i], errors[i] = effect.estimate, effect.standard_error
    half = float(ndtri((1 + level) / 2)) * errors
    return Sensitivity(grid, estimates, errors, estimates - half, estimates + half, replaced, level)
