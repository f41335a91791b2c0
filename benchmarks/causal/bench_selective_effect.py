"""Beside DoubleML with the same learners: seconds, and error where the instrument acts on the outcome and where not.

Where exclusion fails DoubleML's instrumental models are off by more than the effect; where it holds they are about as
precise here. Seconds are those of the learners: seven fits a fold beside five of IIVM.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from sklearn.dummy import DummyClassifier, DummyRegressor
from threadpoolctl import threadpool_limits

from benchmarks.causal.doubleml_peer import doubleml, learners
from benchmarks.harness import Comparison, compare, growth
from locally.causal.selective_effect import InvalidIVATE, MultiplyRobustIVATE, SelectiveIVATE

FOLDS = 3
MODELS = ("IIVM", "PLIV", "IRM")
Columns = tuple[ndarray, ndarray, ndarray, ndarray]


def main() -> list[Comparison]:
    with threadpool_limits(1):
        results = [*selection(), *growths()]
        ask = doubleml()
        if ask is not None:
            with tempfile.TemporaryDirectory() as folder:
                results += beside_doubleml(ask, Path(folder))
    return results


def draw(n: int, seed: int, direct: float) -> Columns:
    """Effect 1; linear nuisances; `direct` is the instrument's own effect on the outcome, 0 where exclusion holds."""
    rng = np.random.default_rng(seed)
    X, u = rng.uniform(-1, 1, (n, 2)), rng.uniform(-1, 1, n)
    z = (rng.random(n) < 0.5 + 0.2 * X[:, 0]).astype(float)
    a = (rng.random(n) < 0.12 + 0.38 * z + 0.05 * X[:, 1] * z + 0.09 * u).astype(float)
    y = a + direct * z + X[:, 1] + 2 * u + rng.normal(0, 0.5, n)
    return y, a, z, X


def ours(columns: Columns, learner: str) -> float:
    classifier, regressor = learners(learner)
    return InvalidIVATE(classifier, classifier, regressor, n_folds=FOLDS, random_state=0).fit(*columns).coef_


def beside_doubleml(ask: Callable[..., Any], folder: Path) -> list[Comparison]:
    results = []
    n = 8000
    for learner in ("linear", "boosting"):
        columns = draw(n, 0, direct=1.0)
        file = save(folder / f"{learner}.npy", columns)
        us = "InvalidIVATE", partial(ours, columns, learner)
        for model in MODELS:
            them = f"DoubleML {model}", partial(ask, "effect", model=model, file=file, learner=learner, folds=FOLDS)
            results.append(compare(f"n = {n}, {FOLDS} folds, {learner} learners", us, them, rounds=5))
    for direct, name in ((1.0, "the instrument acts on the outcome"), (0.0, "exclusion holds")):
        errors: dict[str, list[float]] = {model: [] for model in ("ours", *MODELS)}
        for seed in range(20):
            columns = draw(n, seed, direct)
            file = save(folder / "replicate.npy", columns)
            errors["ours"].append(ours(columns, "linear") - 1)
            for model in MODELS:
                errors[model].append(
                    ask("effect", model=model, file=file, learner="linear", folds=FOLDS)["estimate"] - 1
                )
        rmse = {model: float(np.sqrt(np.mean(np.square(e)))) for model, e in errors.items()}
        for model in MODELS:
            ratio = rmse["ours"] / rmse[model]
            detail = {"rmse_ours": rmse["ours"], "rmse_peer": rmse[model], "replicates": 20}
            results.append(Comparison(name, "RMSE", ratio, ratio, ratio, "InvalidIVATE", f"DoubleML {model}", detail))
    return results


def save(path: Path, columns: Columns) -> str:
    np.save(path, np.column_stack(columns), allow_pickle=False)
    return str(path)


def selection() -> list[Comparison]:
    """Fits are the sum of the libraries' sizes: one selection beside every combination by itself."""
    columns = draw(2000, 0, direct=1.0)
    classifier, regressor = learners("linear")
    classifiers = [DummyClassifier(strategy="prior"), classifier, learners("boosting")[0]]
    regressors = [DummyRegressor(), regressor, learners("boosting")[1]]

    def select() -> object:
        model = SelectiveIVATE(classifiers, classifiers, regressors, inference="naive", n_folds=FOLDS, random_state=0)
        return model.fit(*columns)

    def one_by_one() -> object:
        return [
            InvalidIVATE(k, l, m, n_folds=FOLDS, random_state=0).fit(*columns).coef_
            for k in classifiers
            for l in classifiers
            for m in regressors
        ]

    pair = ("SelectiveIVATE, 3 learners for each nuisance", select), ("27 fits of InvalidIVATE", one_by_one)
    return [compare("selection, n = 2000", *pair, rounds=3, warmup=0)]


def growths() -> list[Comparison]:
    def parametric(n: int) -> Callable[[], object]:
        columns = draw(n, 0, direct=1.0)
        return lambda: MultiplyRobustIVATE().fit(*columns)

    def debiased(n: int) -> Callable[[], object]:
        columns = draw(n, 0, direct=1.0)
        return lambda: ours(columns, "linear")

    sizes = [4_000, 16_000, 64_000, 256_000]
    return [
        growth("rows", "MultiplyRobustIVATE", sizes, parametric),
        growth("rows", "InvalidIVATE, linear learners", sizes, debiased),
    ]
