"""Choosing among candidate learners by how far the effect moves, not by how well they predict.

If a set of nuisances that suffices is right at its candidates, swapping the others cannot move the effect: movement
shows bias. `pseudo_risk` adds up, over the sets that suffice, the largest movement. Source: arXiv 1907.11882, with the
mixed-minimax criterion of arXiv 1911.02029 carried from two nuisances to any number of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.causal.selective_effect.crossfit import Fits
from locally.causal.selective_effect.effect import Table
from locally.causal.selective_effect.influence import signed_inverse_density
from locally.causal.selective_effect.observations import Observations
from locally.checks import check_choice, check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CRITERIA = ("mixed_minimax", "minimax")


@dataclass(frozen=True)
class Selection:
    """What was chosen and why.

    Attributes:
        index: the candidate of each nuisance, by position in its library.
        axes: the nuisances.
        candidates: names of the learners of each.
        risk: pseudo-risk of every combination, in squared units of the outcome.
        psi: the effect by split and combination.
    """

    index: tuple[int, ...]
    axes: tuple[str, ...]
    candidates: tuple[tuple[str, ...], ...]
    risk: Float[ndarray, "*candidates"]
    psi: Float[ndarray, "splits *candidates"]

    @property
    def names(self) -> tuple[str, ...]:
        """The choice in words."""
        return self._names(self.index)

    def table(self, rows: int = 10) -> Table:
        """The combinations of least risk, with the effect and how far it varies over splits."""
        check_count("rows", rows)
        effects, spread = self.psi.mean(axis=0), self.psi.std(axis=0)
        order = np.argsort(self.risk, axis=None, kind="stable")[:rows]
        best = [tuple(i) for i in np.stack(np.unravel_index(order, self.risk.shape), axis=1).tolist()]
        lines = ((", ".join(self._names(i)), (self.risk[i], effects[i], spread[i])) for i in best)
        header = ("pseudo-risk", "effect", "spread over splits")
        return Table(header, tuple((name, tuple(float(v) for v in line)) for name, line in lines))

    def plot(self) -> "Figure":
        """Effect of every combination over its pseudo-risk; the chosen one marked."""
        from locally.plots import INK, PALETTE, canvas

        figure, axes = canvas(6.4, 3.8)
        effects = self.psi.mean(axis=0)
        axes.plot(np.sqrt(self.risk).ravel(), effects.ravel(), "o", color=PALETTE[0], alpha=0.5, label="combinations")
        chosen = np.sqrt(self.risk[self.index]), effects[self.index]
        axes.plot(*chosen, "o", color=PALETTE[1], markersize=9, label="chosen: " + ", ".join(self.names))
        axes.set(xlabel="root of the pseudo-risk, units of the outcome", ylabel="effect", title="Movement shows bias")
        axes.legend(labelcolor=INK, fontsize=8)
        return figure

    def _names(self, index: Sequence[int]) -> tuple[str, ...]:
        return tuple(f"{axis}: {names[i]}" for axis, names, i in zip(self.axes, self.candidates, index))


def pseudo_risk(
    psi: Float[ndarray, "splits *candidates"],
    sufficient: Sequence[tuple[int, ...]],
    criterion: str = "mixed_minimax",
) -> Float[ndarray, "*candidates"]:
    """Pseudo-risk of each combination of candidates.

    For a set of nuisances that suffices, hold its candidates and let the others run over theirs. "mixed_minimax" takes
    the largest mean square (over splits) of the difference between any two of those and adds over the sets: its bias
    is of the order of the product of the best rates. "minimax" takes the largest difference to the combination itself,
    over all sets: of the order of the larger of the best rates.

    Args:
        psi: effects by split and combination.
        sufficient: each set as a tuple of candidate axes, counted from 0.
        criterion: "mixed_minimax" or "minimax".

    O(S C G) time for C combinations and G choices of the largest group of swapped nuisances.

    >>> psi = np.array([[[1.0, 1.0], [1.0, 3.0]]])  # the second of both moves: the first of both is safest
    >>> pseudo_risk(psi, [(0,), (1,)])
    array([[0., 4.],
           [4., 8.]])
    """
    check_choice("criterion", criterion, CRITERIA)
    axes = psi.ndim - 1
    risk = np.zeros(psi.shape[1:])
    for held in sufficient:
        swapped = [j for j in range(axes) if j not in held]
        order = [0, *(1 + j for j in held), *(1 + j for j in swapped)]
        held_shape = [psi.shape[1 + j] for j in held]
        points = psi.transpose(order).reshape(len(psi), int(np.prod(held_shape)), -1)
        differences = np.zeros((points.shape[1], points.shape[2], points.shape[2]))
        for of_split in points:
            differences += (of_split[:, :, None] - of_split[:, None, :]) ** 2
        differences /= len(psi)
        if criterion == "mixed_minimax":
            spread = np.repeat(differences.max(axis=(1, 2))[:, None], points.shape[2], axis=1)
        else:
            spread = differences.max(axis=2)
        back = np.argsort([*held, *swapped])
        spread = spread.reshape([*held_shape, *(psi.shape[1 + j] for j in swapped)]).transpose(back)
        risk = risk + spread if criterion == "mixed_minimax" else np.maximum(risk, spread)
    return risk


def smooth_weights(risk: Float[ndarray, "*candidates"], temperature: float) -> Float[ndarray, "*candidates"]:
    """Weights exp(-temperature risk / smallest positive risk), scaled to sum to one."""
    positive = risk[risk > 0]
    exponent = -temperature * risk / (positive.min() if positive.size else 1.0)
    weights = np.exp(exponent - exponent.max())
    return weights / weights.sum()


def effects_by_split(
    fits: Fits, obs: Observations, trim_z: float, trim_d: float
) -> Float[ndarray, "splits *candidates"]:
    """Mean score on each held-out part for every combination of candidates; linear in 1/f, so pi comes for free."""
    shape = fits.shape
    order = np.argsort(fits.fold, kind="stable")
    starts = np.flatnonzero(np.diff(fits.fold[order], prepend=-1))
    sizes = np.diff([*starts, obs.n])
    inverse = signed_inverse_density(obs.z, np.clip(fits.pi, trim_z, 1 - trim_z))
    psi = np.empty((len(sizes), *shape))
    for rest in np.ndindex(*shape[1:]):
        values = fits.values((0, *rest), trim_z, trim_d)
        scores = values.beta + inverse * values.correction(obs.z, obs.a, obs.y)
        psi[(slice(None), slice(None), *rest)] = (np.add.reduceat(scores[:, order], starts, axis=1) / sizes).T
    return psi


def first_minimum(risk: Float[ndarray, "*candidates"]) -> tuple[int, ...]:
    """Ties go to the smallest index."""
    return tuple(int(i) for i in np.unravel_index(risk.argmin(), risk.shape))
