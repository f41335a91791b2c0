"""The experiment at quick scale, its designs against their own truths, the 401(k) loader and study on a tiny file."""

import csv

import numpy as np
import pytest

from locally.catalogue import load
from locally.causal.selective_effect import Observations
from locally.causal.selective_effect.crossfit import cross_fit
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.papers.selective_ate import (
    COVARIATES,
    INSTRUMENT,
    OUTCOME,
    RIGHT,
    SELECTIVE,
    TREATMENT,
    Study,
    carry_out,
    draw_hidden,
    draw_parametric,
    experiment,
    fit_with,
    least_prediction_error,
    libraries,
    read_401k,
)

TINY = Study(400, 3, 400, 3, 600, 1, ("constant", "linear"), 2, 2, split_swap=False, wealth_repetitions=0)


def values(run: Run, method: str, metric: str) -> dict[int | None, float]:
    return {m.seed: m.value for m in run.measures if (m.method, m.metric) == (method, metric)}


def test_quick_scale_bears_out_what_it_can_decide(quick):
    (card,) = (paper for paper in load() if paper.slug == "selective-ate")
    verdict = judge(card.claims, quick.measures, Scale.QUICK)
    decided = [f for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert decided
    assert all(f.claim.satisfied_by(f.estimate, f.estimate) for f in decided)


def test_every_claim_finds_its_records(quick):
    (card,) = (paper for paper in load() if paper.slug == "selective-ate")
    for claim in card.claims:
        found = [
            m
            for m in quick.measures
            if (m.method, m.metric) == (claim.method, claim.metric) and claim.setting.items() <= m.setting.items()
        ]
        assert found, claim.statement


def test_every_seed_and_both_figures_are_there(quick):
    for method in ("linear", "boosting", SELECTIVE, f"{SELECTIVE}, smooth", "two-stage least squares"):
        assert set(values(quick, method, "RMSE")) == {0, 1}
    assert [f.name for f in quick.figures] == ["working-models", "learners"]


def test_same_seeds_same_measures(without_shape_checks):
    def measures():
        run = Run(scale="quick", seeds=(5,))
        carry_out(run, TINY)
        return run.measures

    assert measures() == measures()


def test_paper_scale_is_the_full_study(monkeypatch):
    handed = []
    monkeypatch.setattr("locally.papers.selective_ate.carry_out", lambda run, study: handed.append(study))
    experiment(Run(scale="paper", seeds=range(10)))
    (study,) = handed
    assert study.wealth_repetitions >= 5
    assert study.split_swap
    assert study.trees == 60


def test_designs_are_what_they_say():
    """E[Y - beta A | Z] and the violated exclusion restriction, from large samples."""
    y, a, z, X = draw_parametric(200_000, np.random.default_rng(0))
    rest = y - (1 + 0.5 * X[:, 0]) * a
    design = np.column_stack([np.ones(len(z)), z, X, z * X[:, 1]])
    found = np.linalg.lstsq(design, rest, rcond=None)[0]
    np.testing.assert_allclose(found, [0.5, 1, -0.8, 0, 0.6], atol=0.03)
    for arm in (0, 1):  # the covariance that U causes is 0.09 * 3 * Var(U) in either arm
        rows = z == arm
        p = 1 / (1 + np.exp(-(-2 + 2 * arm + 0.4 * X[rows, 0] - 0.3 * X[rows, 1] * arm)))
        assert np.mean((a[rows] - p) * rest[rows]) == pytest.approx(0.09, abs=0.015)

    y, a, z, X = draw_hidden(100_000, np.random.default_rng(0))
    h = np.sign(X[:, 0] * X[:, 1]) * np.sqrt(np.abs(X[:, 0] * X[:, 1]))
    assert np.abs(np.corrcoef(np.column_stack([h, X]).T)[0, 1:]).max() < 0.02  # no linear learner sees h
    assert a[z == 1].mean() - a[z == 0].mean() > 0.3


def test_wrong_models_are_wrong():
    data = draw_parametric(4000, np.random.default_rng(1))
    right, wrong = fit_with(RIGHT["all"], data), fit_with(RIGHT["none"], data)
    for name in ("pi", "p", "beta", "omega", "theta"):
        assert not np.allclose(getattr(right.solution_.values, name), getattr(wrong.solution_.values, name))
    only = fit_with(RIGHT["pi, p"], data).solution_.values
    np.testing.assert_array_equal(only.pi, right.solution_.values.pi)
    np.testing.assert_array_equal(only.p, right.solution_.values.p)


def test_least_prediction_error_takes_the_better_learner_of_each():
    rng = np.random.default_rng(0)
    X = rng.uniform(-1, 1, (2000, 2))
    z = (rng.random(2000) < 0.5 + 0.4 * X[:, 0]).astype(float)
    a = (rng.random(2000) < 0.2 + z * (0.4 + 0.3 * X[:, 1])).astype(float)
    obs = Observations.read(3 * X[:, 0] + rng.normal(size=2000), a, z, X)
    fits = cross_fit(obs, libraries(("constant", "linear"), 1, 1), 2, seed=0)
    assert least_prediction_error(fits, obs) == (1, 1, 1)


# 401(k) ---------------------------------------------------------------------------------------------------------------


def write_401k(path, n=400, drop=(), spoil=None):
    """A made-up file of the study's form: one-sided compliance, other columns too."""
    rng = np.random.default_rng(0)
    table = {"male": rng.integers(0, 2, n)}
    table |= {name: rng.integers(0, 2, n) for name in COVARIATES}
    table["age"], table["inc"] = rng.integers(25, 64, n), rng.integers(5_000, 90_000, n)
    table[INSTRUMENT] = rng.integers(0, 2, n)
    table[TREATMENT] = table[INSTRUMENT] * (rng.random(n) < 0.7)
    table[OUTCOME] = (table["inc"] * 0.3 + 9000 * table[TREATMENT] + rng.normal(0, 5000, n)).round()
    if spoil:
        table[spoil] = np.full(n, "NA")
    names = [name for name in table if name not in drop]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(names)
        writer.writerows(zip(*(table[name].tolist() for name in names)))
    return table


def test_the_401k_file_is_read_by_name(tmp_path):
    table = write_401k(tmp_path / "401k.csv")
    found = read_401k(tmp_path / "401k.csv")
    assert set(found) == {OUTCOME, TREATMENT, INSTRUMENT, *COVARIATES}
    for name, column in found.items():
        np.testing.assert_array_equal(column, table[name])


def test_other_files_are_refused_by_name(tmp_path):
    write_401k(tmp_path / "short.csv", drop=("age", "pira"))
    with pytest.raises(ValueError, match=r"short\.csv lacks the columns age, pira"):
        read_401k(tmp_path / "short.csv")
    write_401k(tmp_path / "words.csv", spoil="educ")
    with pytest.raises(ValueError, match=r"column educ holds something that is not a number"):
        read_401k(tmp_path / "words.csv")


def test_the_full_size_study_runs_on_a_small_file(tmp_path, without_shape_checks):
    (tmp_path / "401k").mkdir()
    write_401k(tmp_path / "401k" / "401k.csv")
    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    carry_out(run, Study(400, 2, 400, 2, 600, 1, ("constant", "linear"), 2, 2, split_swap=True, wealth_repetitions=1))
    effects = {m.method: m.value for m in run.measures if m.metric.startswith("401(k): effect on")}
    assert {"two-stage least squares", "linear, cells", "linear, moments", f"{SELECTIVE}, split_swap"} <= set(effects)
    assert all(np.isfinite(v) for v in effects.values())
    assert effects["linear, cells"] == pytest.approx(9000, abs=3000)
    assert f"{SELECTIVE}, split and swap" in {m.method for m in run.measures}


def test_without_the_data_the_study_asks_for_them():
    with pytest.raises(MissingData, match="401k"):
        experiment(Run(scale="paper", seeds=(0,)))
