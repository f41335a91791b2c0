"""An invalid instrument in two designs where the effect is 1: parametric models, some wrong, and libraries of learners.

In the first the working models are right or wrong by design and the bias shows which sets of them suffice. In the
second no linear learner sees the nuisances and the selection must find out. At paper scale the 401(k) study follows.
"""

import csv
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from locally.causal.selective_effect import (
    Effect,
    InvalidIVATE,
    MultiplyRobustIVATE,
    Observations,
    SelectiveIVATE,
    Status,
    genius,
    least_squares,
    pseudo_risk,
    smooth_weights,
    two_stage_least_squares,
)
from locally.causal.selective_effect.crossfit import CellFits, Libraries, cross_fit
from locally.causal.selective_effect.selection import effects_by_split, first_minimum
from locally.causal.selective_effect.working_models import affine_by_arm, arm_means, intercept
from locally.evidence import Run
from locally.evidence.runs import cores

EFFECT = 1.0
TRIM_Z, TRIM_D = 0.01, 0.03
BIAS, COVERAGE, RMSE = "bias", "coverage of the 95 % interval", "RMSE"
SELECTIVE = "selective machine learning"
ROBUST = ("pi, p", "pi, beta, theta", "p, beta, omega", "beta, theta, omega")
RIGHT = {name: set(name.split(", ")) for name in ROBUST}
RIGHT |= {"all": {"pi", "p", "beta", "theta", "omega"}, "p, theta": {"p", "theta"}, "none": set()}
BASELINES: dict[str, Callable[..., Effect]] = {
    "two-stage least squares": two_stage_least_squares,
    "least squares": least_squares,
    "GENIUS": genius,
}


@dataclass(frozen=True)
class Study:
    """Sizes of one scale; replicates are per seed."""

    rows: int
    replicates: int
    coverage_rows: int
    coverage_replicates: int
    selective_rows: int
    selective_replicates: int
    learners: tuple[str, ...]
    trees: int
    rounds: int  # of boosting
    split_swap: bool
    wealth_repetitions: int  # of the splits in the 401(k) study; none: it is left out


def experiment(run: Run) -> None:
    every = ("constant", "linear", "forest", "boosting")
    few = ("constant", "linear", "boosting")
    carry_out(
        run,
        run.pick(
            quick=Study(8000, 8, 4000, 20, 3000, 1, few, 0, 20, split_swap=False, wealth_repetitions=0),
            default=Study(8000, 24, 4000, 800, 8000, 1, every, 20, 60, split_swap=False, wealth_repetitions=0),
            paper=Study(8000, 200, 4000, 2000, 8000, 20, every, 60, 60, split_swap=True, wealth_repetitions=5),
        ),
    )


def carry_out(run: Run, study: Study) -> None:
    table = None
    if study.wealth_repetitions:
        table = read_401k(run.data("401k/401k.csv", "the 401(k) study, SIPP 1991, as comma-separated text"))
    # OpenMP keeps its limit by thread, so that every worker sets its own
    with threadpool_limits(1), ThreadPoolExecutor(cores(), initializer=threadpool_limits, initargs=(1,)) as pool:
        errors = parametric_study(run, study, pool)
        coverage_study(run, study, pool)
        selective = selective_study(run, study, pool)
        if table is not None:
            wealth_study(run, table, study)
    plot_bias(run, errors)
    plot_learners(run, selective)


# Parametric working models --------------------------------------------------------------------------------------------


def draw_parametric(n: int, rng: np.random.Generator) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Y, A, Z, X: Z acts on Y by 1 + 0.6 X2, U on A and Y; beta = 1 + X1 / 2."""
    X, U = rng.uniform(-1, 1, (n, 2)), rng.uniform(-1, 1, n)
    Z = (rng.random(n) < expit(0.4 * X[:, 0] - 0.5 * X[:, 1])).astype(float)
    A = (rng.random(n) < expit(-2 + 2 * Z + 0.4 * X[:, 0] - 0.3 * X[:, 1] * Z) + 0.09 * U).astype(float)
    beta = EFFECT + 0.5 * X[:, 0]
    direct = 0.5 + Z + 0.6 * Z * X[:, 1] - 0.8 * X[:, 0]
    Y = beta * A + direct + 3 * (1 + 0.5 * X[:, 1]) * U + rng.normal(0, 0.5, n)
    return Y, A, Z, X


def fit_with(right: set[str], data: tuple[ndarray, ndarray, ndarray, ndarray]) -> MultiplyRobustIVATE:
    """The multiply robust estimate with the working models outside `right` misspecified."""
    _, A, Z, X = data
    model = MultiplyRobustIVATE(trim_z=TRIM_Z)
    if "beta" not in right:
        model.set_params(beta_basis=intercept)
    if "omega" not in right:
        model.set_params(omega_basis=intercept)
    model.set_params(theta_basis=affine_by_arm if "theta" in right else arm_means)
    pi = None if "pi" in right else 0.25 + 0.5 * (X[:, 1] > 0)
    p = None
    if "p" not in right:
        p = np.repeat([[A[Z == 0].mean() + 0.12], [A[Z == 1].mean() - 0.05]], len(A), axis=1)
    return model.fit(*data, pi=pi, p=p)


def parametric_study(run: Run, study: Study, pool: ThreadPoolExecutor) -> dict[str, list[float]]:
    """Bias and coverage by which working models are right; returns the errors of every replicate."""
    pooled: dict[str, list[float]] = {name: [] for name in (*RIGHT, *BASELINES)}
    for seed in run.track(run.seeds, "parametric models"):
        replicates = list(pool.map(partial(parametric_replicate, study.rows, seed), range(study.replicates)))
        for name in pooled:
            effects = [effects[name] for effects in replicates]
            errors = [e.estimate - EFFECT for e in effects]
            pooled[name] += errors
            bias = float(np.mean(errors))
            method, setting = ("multiply robust", {"right": name}) if name in RIGHT else (name, {})
            run.record(method, BIAS, bias, seed=seed, design="parametric", **setting)
            run.record(method, COVERAGE, share_covered(effects), seed=seed, n=study.rows, **setting)
            if name in BASELINES:
                run.record(method, "absolute bias", abs(bias), seed=seed, design="parametric")
        wrong = float(np.mean([effects["none"].estimate - EFFECT for effects in replicates]))
        run.record("multiply robust", "absolute bias, every model wrong", abs(wrong), seed=seed)
    # the unit is the Monte Carlo error of all replicates, so that this is one number and not one a seed
    largest = max(abs(float(np.mean(pooled[name]))) / monte_carlo_error(pooled[name]) for name in ROBUST)
    run.record("multiply robust", "largest bias over the four robust cases, in Monte Carlo standard errors", largest)
    return pooled


def parametric_replicate(n: int, seed: int, replicate: int) -> dict[str, Effect]:
    data = draw_parametric(n, np.random.default_rng([4, seed, replicate]))
    return {name: fit_with(right, data).effect_ for name, right in RIGHT.items()} | {
        name: baseline(*data) for name, baseline in BASELINES.items()
    }


def coverage_study(run: Run, study: Study, pool: ThreadPoolExecutor) -> None:
    """How often the sandwich interval covers the effect with every model right, over many small samples."""
    for seed in run.track(run.seeds, "coverage"):

        def covered(replicate: int, seed: int = seed) -> bool:
            data = draw_parametric(study.coverage_rows, np.random.default_rng([5, seed, replicate]))
            return covers(fit_with(RIGHT["all"], data).effect_)

        share = float(np.mean(list(pool.map(covered, range(study.coverage_replicates)))))
        run.record("multiply robust", COVERAGE, share, seed=seed, n=study.coverage_rows, right="all")


# Libraries of learners ------------------------------------------------------------------------------------------------


def draw_hidden(n: int, rng: np.random.Generator) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Y, A, Z, X whose nuisances depend on the sign of X1 X2, which no linear learner sees; beta = 1 + X1 / 2."""
    X, U = rng.uniform(-1, 1, (n, 4)), rng.uniform(-1, 1, n)
    product = X[:, 0] * X[:, 1]
    h = np.sign(product) * np.sqrt(np.abs(product))
    Z = (rng.random(n) < expit(2 * h)).astype(float)
    A = (rng.random(n) < np.where(Z == 1, 0.5 + 0.15 * h, 0.14 + 0.06 * h) + 0.07 * U).astype(float)
    Y = (EFFECT + 0.5 * X[:, 0]) * A + Z * (1 + 2 * h) + 3 * h + 2 * U + rng.normal(0, 0.5, n)
    return Y, A, Z, X


def libraries(names: Sequence[str], trees: int, rounds: int) -> Libraries:
    """The same kinds of learner for every nuisance; trees in half samples where there are few."""
    forest: dict[str, Any] = {"n_estimators": max(trees, 1), "min_samples_leaf": 20 if trees >= 60 else 10}
    forest |= {"max_samples": None if trees >= 60 else 0.5}
    boosting = {"max_iter": rounds, "max_leaf_nodes": 8}
    classifiers = {
        "constant": DummyClassifier(strategy="prior"),
        "linear": make_pipeline(StandardScaler(), LogisticRegression()),
        "forest": RandomForestClassifier(**forest),
        "boosting": HistGradientBoostingClassifier(**boosting),
    }
    regressors = {
        "constant": DummyRegressor(),
        "linear": LinearRegression(),
        "forest": RandomForestRegressor(**forest),
        "boosting": HistGradientBoostingRegressor(**boosting),
    }
    chosen = tuple(classifiers[name] for name in names)
    return Libraries(chosen, chosen, tuple(regressors[name] for name in names))


def selective_study(run: Run, study: Study, pool: ThreadPoolExecutor) -> dict[str, list[float]]:
    """Errors of each single learner, of selections and baselines, on the same replicates."""
    pooled: dict[str, list[float]] = {}
    for seed in run.track(run.seeds, "learners"):
        work = partial(selective_replicate, study, seed)
        replicates = list(pool.map(work, range(study.selective_replicates)))
        rmse = {}
        for method in replicates[0]:
            effects = [effects[method] for effects in replicates]
            errors = [e.estimate - EFFECT for e in effects]
            pooled.setdefault(method, []).extend(errors)
            rmse[method] = float(np.sqrt(np.mean(np.square(errors))))
            run.record(method, RMSE, rmse[method], seed=seed, design="learners", n=study.selective_rows)
            run.record(method, BIAS, float(np.mean(errors)), seed=seed, design="learners", n=study.selective_rows)
            if method not in BASELINES:
                share = share_covered(effects)
                run.record(method, COVERAGE, share, seed=seed, design="learners", n=study.selective_rows)
        run.record(SELECTIVE, "RMSE / that of linear learners", rmse[SELECTIVE] / rmse["linear"], seed=seed)
        best = min(rmse[name] for name in study.learners)
        run.record(SELECTIVE, "RMSE / that of the best single learner", rmse[SELECTIVE] / best, seed=seed)
        by_prediction = rmse[SELECTIVE] / rmse["least prediction error"]
        run.record(SELECTIVE, "RMSE / that of choosing by prediction error", by_prediction, seed=seed)
    return pooled


def selective_replicate(study: Study, seed: int, replicate: int) -> dict[str, Effect]:
    data = draw_hidden(study.selective_rows, np.random.default_rng([6, seed, replicate]))
    library = libraries(study.learners, study.trees, study.rounds)
    seed_of_fits = 1000 * seed + replicate
    effects = from_one_cross_fit(Observations.read(*data), library, study.learners, seed_of_fits)
    effects |= {name: baseline(*data) for name, baseline in BASELINES.items()}
    if study.split_swap:
        model = SelectiveIVATE(library.z, library.a, library.y, n_folds=3, random_state=seed_of_fits)
        effects[f"{SELECTIVE}, split and swap"] = model.fit(*data).effect_
    return effects


def from_one_cross_fit(obs: Observations, library: Libraries, names: Sequence[str], seed: int) -> dict[str, Effect]:
    """Every single learner and every way to choose, all from the same cross-fitted nuisances."""
    fits = cross_fit(obs, library, 3, seed)
    assert isinstance(fits, CellFits)

    def at(index: tuple[int, ...]) -> ndarray:
        return fits.values(index, TRIM_Z, TRIM_D).scores(obs.z, obs.a, obs.y)

    psi = effects_by_split(fits, obs, TRIM_Z, TRIM_D)
    mixed, minimax = (pseudo_risk(psi, fits.sufficient, c) for c in ("mixed_minimax", "minimax"))
    weights = smooth_weights(mixed, 10.0)
    heavy = [tuple(i) for i in np.argwhere(weights > 1e-3).tolist()]
    smooth = sum(weights[i] * at(i) for i in heavy) / sum(weights[i] for i in heavy)
    scores = {name: at((i, i, i)) for i, name in enumerate(names)} | {
        SELECTIVE: at(first_minimum(mixed)),
        f"{SELECTIVE}, minimax": at(first_minimum(minimax)),
        f"{SELECTIVE}, smooth": smooth,
        "least prediction error": at(least_prediction_error(fits, obs)),
    }
    return {name: Effect.from_scores(s[None], Status.IDENTIFIED, name) for name, s in scores.items()}


def least_prediction_error(fits: CellFits, obs: Observations) -> tuple[int, int, int]:
    """What cross-validation would choose: smallest squared error on held-out rows, for each nuisance by itself."""
    z, a = obs.z.astype(int), obs.a.astype(int)
    rows = np.arange(obs.n)
    of_pi = ((fits.pi - obs.z) ** 2).mean(axis=1)
    of_p = ((fits.p[:, z, rows] - obs.a) ** 2).mean(axis=1)
    of_mu = ((fits.mu[:, a, z, rows] - obs.y) ** 2).mean(axis=1)
    return int(of_pi.argmin()), int(of_p.argmin()), int(of_mu.argmin())


# 401(k) plans ---------------------------------------------------------------------------------------------------------

OUTCOME, TREATMENT, INSTRUMENT = "net_tfa", "p401", "e401"
COVARIATES = ("age", "inc", "fsize", "educ", "db", "marr", "twoearn", "pira", "hown")


def read_401k(path: Path) -> dict[str, Float[ndarray, " n"]]:
    """Net financial assets (dollars), participation, eligibility and nine covariates, by name.

    Raises:
        ValueError: a column is missing or holds something that is not a number.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    wanted = (OUTCOME, TREATMENT, INSTRUMENT, *COVARIATES)
    missing = [name for name in wanted if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path.name} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}")
    table = {}
    for name in wanted:
        try:
            table[name] = np.array([float(row[name]) for row in rows])
        except (TypeError, ValueError):
            raise ValueError(f"{path.name}: column {name} holds something that is not a number") from None
    return table


def wealth_study(run: Run, table: dict[str, ndarray], study: Study) -> None:
    """Dollars of net financial assets that participation brings, with eligibility as an instrument that may act itself.

    Nobody takes part who is not eligible, so that v_0 = c_0 = 0: omega is 0 in one arm and, if it is the same in both,
    everywhere. With such one-sided compliance the assumptions leave no room for unmeasured confounding, and the effect
    is the difference between participants and others among the eligible.
    """
    names = tuple(name for name in study.learners if name != "constant")
    library = libraries(names, study.trees, study.rounds)
    splits: dict[str, Any] = {"n_folds": 3, "n_rep": study.wealth_repetitions, "random_state": 0}
    a, z = table[TREATMENT], table[INSTRUMENT]
    columns = OUTCOME, TREATMENT, INSTRUMENT, table
    obs = Observations.read(*columns)
    effects: dict[str, Effect] = {name: baseline(obs.y, obs.a, obs.z, obs.X) for name, baseline in BASELINES.items()}
    for i, name in enumerate(names):
        for outcome in ("cells", "moments"):
            single = InvalidIVATE(library.z[i], library.a[i], library.y[i], outcome=outcome, **splits)
            effects[f"{name}, {outcome}"] = single.fit(*columns).effect_
            if outcome == "cells":
                seen = single.overlap()
                run.record(name, "401(k): rows with the variance gap replaced", seen.n_stabilised)
                run.record(name, "401(k): effective rows", seen.effective_rows)
    for inference in ("naive", "split_swap", "smooth"):
        model = SelectiveIVATE(library.z, library.a, library.y, inference=inference, **splits)
        effects[f"{SELECTIVE}, {inference}"] = model.fit(*columns).effect_
    for method, effect in effects.items():
        run.record(method, "401(k): effect on net financial assets, dollars", effect.estimate)
        run.record(method, "401(k): standard error, dollars", effect.standard_error)
    run.record("data", "401(k): participants who are not eligible", float(a[z == 0].sum()))


# Figures --------------------------------------------------------------------------------------------------------------


def plot_bias(run: Run, errors: dict[str, list[float]]) -> None:
    """Bias with its Monte Carlo interval by which models are right, beside the baselines."""
    from locally.plots import INK, PALETTE, canvas

    figure, axes = canvas(7.6, 4.4)
    labels = {"all": "all right", "none": "none right"}
    order = ["all", *ROBUST, "p, theta", "none", *BASELINES]
    for row, name in enumerate(order):
        bias, half = np.mean(errors[name]), 1.96 * monte_carlo_error(errors[name])
        guaranteed = name == "all" or name in ROBUST
        colour = PALETTE[0] if guaranteed else PALETTE[1] if name in RIGHT else PALETTE[7]
        axes.errorbar(bias, row, xerr=half, fmt="o", color=colour, capsize=3)
        side = ("left", 9) if bias >= 0 else ("right", -9)
        axes.annotate(
            f"{bias:+.3f}", (bias, row), (side[1], 6), textcoords="offset points", fontsize=8, color=INK, ha=side[0]
        )
    axes.axvline(0, color=INK, lw=1)
    axes.set_yticks(range(len(order)), [n if n in BASELINES else labels.get(n, f"only {n} right") for n in order])
    axes.invert_yaxis()
    axes.set(xlabel="bias of the effect (the effect is 1)", title="One right set of working models suffices")
    axes.margins(x=0.12)
    caption = (
        f"Mean error over {len(errors['all'])} replicates with 95 % Monte Carlo intervals. Blue: a set of working"
        " models is right that suffices. Orange: none is. Grey: methods that assume that the instrument acts through"
        " the treatment alone (two-stage least squares), that nothing unseen confounds (least squares), or that the"
        " effect is constant (GENIUS)."
    )
    run.figure(figure, "working-models", caption)


def plot_learners(run: Run, errors: dict[str, list[float]]) -> None:
    """Absolute errors of every replicate and their root mean square, by learner."""
    from locally.plots import INK, PALETTE, canvas

    figure, axes = canvas(7.6, 0.9 + 0.36 * len(errors))
    for row, (method, of_method) in enumerate(errors.items()):
        colour = PALETTE[0] if method.startswith(SELECTIVE) else PALETTE[7] if method in BASELINES else PALETTE[2]
        absolute = np.maximum(np.abs(of_method), 1e-3)
        axes.plot(absolute, np.full(len(absolute), row), "o", color=colour, alpha=0.45, markersize=4)
        axes.plot(np.sqrt(np.mean(np.square(of_method))), row, "|", color=INK, markersize=16, mew=2)
    axes.plot([], [], "|", color=INK, markersize=12, mew=2, ls="", label="root mean square")
    axes.set_xscale("log")
    axes.set_yticks(range(len(errors)), list(errors))
    axes.invert_yaxis()
    axes.set(xlabel="absolute error of the effect (the effect is 1)", title="Which learners, when nobody knows?")
    axes.legend(labelcolor=INK, loc="upper right")
    caption = (
        "A dot for each replicate, a bar for the root mean square error. Single learners serve for every nuisance;"
        " selections choose one for each, by how little the effect moves, or by least prediction error."
    )
    run.figure(figure, "learners", caption)


def covers(effect: Effect) -> bool:
    low, high = effect.confint()
    return low <= EFFECT <= high


def share_covered(effects: Sequence[Effect]) -> float:
    return sum(map(covers, effects)) / len(effects)


def monte_carlo_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def expit(x: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    return 1 / (1 + np.exp(-x))
