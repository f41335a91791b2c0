"""Selective machine learning of the effect: learners chosen by how little the effect moves when others are swapped.

Source: arXiv 1907.11882; the criteria, split and swap, and the smooth choice are those of arXiv 1911.02029.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from sklearn.model_selection import StratifiedKFold

from locally.causal.selective_effect.crossfit import Fits, Libraries, cross_fit
from locally.causal.selective_effect.debiased import InvalidIVATE, Mixture
from locally.causal.selective_effect.influence import WorkingValues
from locally.causal.selective_effect.learners import check_learner, name_of
from locally.causal.selective_effect.observations import Observations, check_cells
from locally.causal.selective_effect.selection import (
    CRITERIA,
    Selection,
    effects_by_split,
    first_minimum,
    pseudo_risk,
    smooth_weights,
)
from locally.checks import check_choice, check_positive

NEGLIGIBLE = 1e-6  # weight of a combination below which "smooth" leaves it out


class SelectiveIVATE(InvalidIVATE):
    """The same with a library of learners for each nuisance, chosen by how little the effect moves.

    Arguments as for `InvalidIVATE`, with a sequence of learners in the place of each learner, and

    Args:
        criterion: "mixed_minimax" (bias of the order of the product of the best rates) or "minimax".
        inference: "split_swap" selects on one half, estimates on the other, swaps and averages, so that the interval
            does not ignore the selection; "naive" selects and estimates on all rows; "smooth" averages combinations
            with weights exp(-temperature risk / smallest positive risk).
        temperature: of "smooth", positive.
        n_folds, n_rep: their product is the number S of splits over which movement is averaged; where the criterion is
            noisy raise n_rep (n_folds=2 with n_rep=10: repeated halves).

    Attributes:
        selections_: the `Selection` of each half ("split_swap") or of all rows: index, names, risk, psi.
        coef_, se_, effect_, values_: as for `InvalidIVATE`.

    S (|Z| + 2|A| + 4|Y|) fits, not the product of the library sizes; a score mean for each combination.

    >>> from sklearn.dummy import DummyClassifier, DummyRegressor
    >>> from sklearn.linear_model import LinearRegression, LogisticRegression
    >>> rng = np.random.default_rng(0)
    >>> X, u = rng.uniform(-1, 1, (4000, 1)), rng.uniform(-1, 1, 4000)
    >>> z = (rng.random(4000) < 0.5 + 0.3 * X[:, 0]).astype(float)
    >>> a = (rng.random(4000) < 0.1 + z * (0.35 + 0.3 * X[:, 0]) + 0.09 * u).astype(float)
    >>> y = 2 * a + z * (1 + X[:, 0]) + 3 * X[:, 0] + u + rng.normal(0, 0.5, 4000)
    >>> classifiers = [DummyClassifier(strategy="prior"), LogisticRegression()]
    >>> model = SelectiveIVATE(
    ...     classifiers, classifiers, [DummyRegressor(), LinearRegression()], inference="naive", random_state=0
    ... )
    >>> model.fit(y, a, z, X).selections_[0].names[1]
    'p: LogisticRegression'
    """

    def __init__(
        self,
        ml_z: Sequence[Any],
        ml_a: Sequence[Any],
        ml_y: Sequence[Any] | None = None,
        *,
        ml_beta: Sequence[Any] | None = None,
        ml_theta: Sequence[Any] | None = None,
        ml_omega: Sequence[Any] | None = None,
        outcome: str = "cells",
        criterion: str = "mixed_minimax",
        inference: str = "split_swap",
        temperature: float = 10.0,
        n_folds: int = 5,
        n_rep: int = 1,
        trim_z: float = 0.01,
        trim_d: float = 0.03,
        n_jobs: int | None = None,
        random_state: int | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(
            ml_z,
            ml_a,
            ml_y,
            ml_beta=ml_beta,
            ml_theta=ml_theta,
            ml_omega=ml_omega,
            outcome=outcome,
            n_folds=n_folds,
            n_rep=n_rep,
            trim_z=trim_z,
            trim_d=trim_d,
            n_jobs=n_jobs,
            random_state=random_state,
            callback=callback,
        )
        self.criterion = criterion
        self.inference = inference
        self.temperature = temperature

    def fit(self, y: Any, a: Any, z: Any, X: Any) -> "SelectiveIVATE":
        """Select and estimate; data as for `InvalidIVATE.fit`."""
        check_choice("criterion", self.criterion, CRITERIA)
        check_choice("inference", self.inference, ("split_swap", "naive", "smooth"))
        check_positive("temperature", self.temperature)
        obs, libraries = self._prepare(y, a, z, X)
        if self.inference == "split_swap":
            mixtures = self._split_swap(obs, libraries)
        else:
            selection, fits = self._select(obs, libraries, self._seeds(self.n_rep), self.n_rep)
            self.selections_: tuple[Selection, ...] = (selection,)
            if self.inference == "smooth":
                weights = smooth_weights(selection.risk, self.temperature)
            else:
                weights = np.zeros(selection.risk.shape)
                weights[selection.index] = 1.0
            weights[weights < NEGLIGIBLE] = 0.0
            weights /= weights.sum()
            heaviest_first = sorted(np.argwhere(weights).tolist(), key=lambda i: -weights[tuple(i)])
            mixtures = [
                [(float(weights[tuple(i)]), f.values(tuple(i), self.trim_z, self.trim_d)) for i in heaviest_first]
                for f in fits
            ]
        self._conclude(obs, mixtures)
        return self

    def _select(
        self, obs: Observations, libraries: Libraries, seeds: list[int], total: int, done: int = 0
    ) -> tuple[Selection, list[Fits]]:
        fits = []
        for seed in seeds:
            fits.append(cross_fit(obs, libraries, self.n_folds, seed, self.n_jobs))
            done += 1
            self._report(done, total)
        psi = np.concatenate([effects_by_split(f, obs, self.trim_z, self.trim_d) for f in fits])
        risk = pseudo_risk(psi, fits[0].sufficient, self.criterion)
        candidates = tuple(tuple(map(name_of, group)) for group in libraries.groups)
        return Selection(first_minimum(risk), fits[0].axes, candidates, risk, psi), fits

    def _split_swap(self, obs: Observations, libraries: Libraries) -> list[Mixture]:
        """Select on one half, fit the chosen learners on the other, swap; the halves' values side by side."""
        first, second = halves(obs, self._seeds(1)[0])
        check_cells(obs[first], self.n_folds)
        check_cells(obs[second], self.n_folds)
        seeds = self._seeds(1 + 4 * self.n_rep)[1:]
        total = len(seeds)
        parts: list[list[tuple[ndarray, WorkingValues]]] = [[] for _ in range(self.n_rep)]
        selections = []
        for h, (choosing, estimating) in enumerate(((first, second), (second, first))):
            own = seeds[2 * h * self.n_rep : 2 * (h + 1) * self.n_rep]
            done = 2 * h * self.n_rep
            selection, _ = self._select(obs[choosing], libraries, own[: self.n_rep], total, done)
            selections.append(selection)
            chosen = libraries.only(selection.index)
            for r, seed in enumerate(own[self.n_rep :]):
                fits = cross_fit(obs[estimating], chosen, self.n_folds, seed, self.n_jobs)
                parts[r].append((estimating, fits.values((0,) * len(fits.shape), self.trim_z, self.trim_d)))
                self._report(done + self.n_rep + r + 1, total)
        self.selections_ = tuple(selections)
        return [[(1.0, WorkingValues.gather(of_repetition))] for of_repetition in parts]

    def _library(self, name: str, probability: bool = False) -> tuple[Any, ...]:
        value = getattr(self, name)
        if value is None:
            return ()
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise TypeError(f"{name} must be a sequence of learners, got {type(value).__name__}")
        if not value:
            raise ValueError(f"{name} must hold at least one learner")
        for i, learner in enumerate(value):
            check_learner(f"{name}[{i}]", learner, probability=probability)
        return tuple(value)


def halves(obs: Observations, seed: int) -> tuple[Int[ndarray, " n1"], Int[ndarray, " n2"]]:
    """Two halves of the rows with like shares of every instrument arm and treatment."""
    strata = 2 * obs.z + obs.a if np.isin(obs.a, (0, 1)).all() else obs.z
    first, second = next(StratifiedKFold(2, shuffle=True, random_state=seed).split(obs.X, strata))
    return first, second
