"""The experiment at quick scale, SciPy's solvers under its stopping rule, the full-size study's wiring."""

import numpy as np
import pytest
from sklearn.datasets import dump_svmlight_file

from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.optimize.gradient_normalized import GradientMethod, LogSumExp
from locally.papers.gradient_normalized_smoothness import (
    BOTH,
    EXACT,
    GAP,
    GRADIENT,
    RANK_ONE,
    SCIPY,
    WEIGHTED,
    Study,
    carry_out,
    descend,
    experiment,
    scipy_descent,
)


def card():
    return next(paper for paper in load() if paper.slug == "gradient-normalized-smoothness")


def test_quick_scale_bears_out_what_it_can_decide(quick):
    findings = judge(card().claims, quick.measures, Scale.QUICK).findings
    decided = [f for f in findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert len(decided) == 6
    # two seeds give wide intervals; the estimates themselves must satisfy the claims
    assert all(f.claim.satisfied_by(f.estimate, f.estimate) for f in decided)


def test_every_claim_has_a_metric_that_some_scale_records(quick):
    recorded = {(m.method, m.metric.replace("of 200", "of 1000")) for m in quick.measures}
    assert all((c.method, c.metric.replace("of 200", "of 1000")) in recorded for c in card().claims)


def test_every_seed_of_the_random_problems_is_recorded(quick):
    for method, metric in (
        (EXACT, "iterations to 1e-8, log-sum-exp"),
        (RANK_ONE, "gradient calls to 1e-8, quartic regression"),
        (BOTH, "iterations to 1e-8, Chebyshev chain of 200"),
    ):
        assert {m.seed for m in quick.measures if (m.method, m.metric) == (method, metric)} == {0, 1}
    assert [f.name for f in quick.figures] == ["gaps"]


def test_the_valley_takes_the_published_number_of_iterations(quick):
    by = {(m.method, m.metric): m.value for m in quick.measures}
    assert by[EXACT, "iterations to 1e-8, Rosenbrock, p = 5"] == 56
    assert by[GRADIENT, "iterations to 1e-8, Rosenbrock, p = 5"] > 500


def test_where_weighted_gauss_newton_loses_is_recorded_too(quick):
    by = {(m.method, m.metric): m.value for m in quick.measures}
    metric = "iterations to 1e-8, log-sum-exp, breast cancer"
    assert by[WEIGHTED, metric] > 2.5 * by[EXACT, metric]  # the factor that the random problem stays below


def test_a_descent_counts_what_its_solver_did():
    f = LogSumExp.centred(np.random.default_rng(0).uniform(-1, 1, (20, 5)), np.zeros(20))
    least = f.fun(np.zeros(5))
    ours = descend(f, np.ones(5), least, GradientMethod)
    assert ours.reached
    assert ours.gaps[-1] <= GAP < ours.gaps[-2]
    assert len(ours.gaps) == len(ours.calls) == ours.iterations + 1
    short = descend(f, np.ones(5), least, GradientMethod, maxiter=2)
    assert not short.reached
    assert short.iterations == 2


@pytest.mark.parametrize("method", SCIPY)
def test_scipys_solvers_stop_at_the_first_point_that_meets_the_target(method):
    f = LogSumExp.centred(np.random.default_rng(0).uniform(-1, 1, (20, 5)), np.zeros(20))
    least = f.fun(np.zeros(5))
    found = scipy_descent(f, np.ones(5), least, method)
    assert found.reached
    assert found.gaps[-1] <= GAP < found.gaps[-2]
    assert not scipy_descent(f, np.ones(5), least, method, limit=3).reached


def test_same_seeds_same_counts(without_shape_checks):
    def measures():
        run = Run(scale="quick", seeds=(5,))
        carry_out(run, Study((20,), (10,), 3, 1, 100, ("L-BFGS-B",), False, ("breast cancer",), ("breast cancer",)))
        return [m for m in run.measures if "seconds" not in m.metric]

    assert measures() == measures()


def test_the_full_size_study_reads_the_users_tables(tmp_path, without_shape_checks):
    rng = np.random.default_rng(0)
    (tmp_path / "libsvm").mkdir()
    for name in ("mushrooms", "a9a"):
        X = (rng.uniform(size=(40, 6)) < 0.4).astype(float)
        dump_svmlight_file(X, rng.integers(1, 3, 40), str(tmp_path / "libsvm" / name), zero_based=False)
    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    study = Study((20,), (10,), 3, 1, 100, tuple(SCIPY), True, ("mushrooms", "a9a"), ("breast cancer",))
    carry_out(run, study)
    metrics = {m.metric for m in run.measures}
    assert {"iterations to 1e-8, log-sum-exp, mushrooms", "iterations to 1e-8, log-sum-exp, a9a"} <= metrics
    with pytest.raises(MissingData, match="mushrooms"):
        carry_out(Run(scale="paper", seeds=(0,)), study)


def test_paper_scale_has_the_papers_sizes(monkeypatch):
    handed = []
    monkeypatch.setattr(
        "locally.papers.gradient_normalized_smoothness.carry_out", lambda run, study: handed.append(study)
    )
    experiment(Run(scale="paper", seeds=(0,)))
    assert 1000 in handed[0].sizes
    assert handed[0].chains[1:] == (1000, 2000)
    assert handed[0].tables == ("mushrooms", "a9a")
