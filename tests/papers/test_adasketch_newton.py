"""The experiment at quick scale, the files that paper scale reads, and the wiring of the CUTEst list."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.optimize.constrained import hock_schittkowski
from locally.papers import adasketch_newton as paper


def test_quick_scale_bears_out_what_it_can_decide(quick):
    (card,) = (p for p in load() if p.slug == "adasketch-newton")
    findings = judge(card.claims, quick.measures, Scale.QUICK).findings
    decided = [f for f in findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert len(decided) == len(findings) - 2
    assert all(f.claim.satisfied_by(f.estimate, f.estimate) for f in decided)


def test_every_method_is_recorded_on_every_problem(quick):
    seen = {(m.method, m.setting.get("problem"), m.seed) for m in quick.measures if m.metric == "final KKT residual"}
    for name in paper.NAMES:
        for method in (paper.ADAPTIVE, paper.L1, "SLSQP (SciPy)", "trust-constr (SciPy)", "augmented Lagrangian"):
            assert (method, name, None) in seen
        for method in (paper.OURS, paper.GAUSSIAN):
            assert {(method, name, 0), (method, name, 1)} <= seen
    assert [f.name for f in quick.figures] == ["evaluations", "rates"]


def test_residuals_of_scipys_methods_have_the_best_multipliers():
    p = hock_schittkowski("HS42").problem
    x = np.array([2.0, 2.0, 0.8, 1.1])
    best = paper.kkt_at(p, x)
    for lam in np.random.default_rng(0).standard_normal((20, 2)):
        assert best <= np.hypot(np.linalg.norm(p.grad(x) + p.jac(x).T @ lam), np.linalg.norm(p.constr(x))) + 1e-12


def test_paper_scale_reads_libsvm_files(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "libsvm").mkdir()
    lines = [
        f"{label} " + " ".join(f"{j}:{v:.3f}" for j, v in enumerate(row, 1) if j != 4)
        for label, row in zip(rng.choice([1, 2], 60), rng.standard_normal((60, 41)))
    ]
    for name in ("a9a", "mushrooms"):
        (tmp_path / "libsvm" / name).write_text("\n".join(lines) + "\n")
    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    features, labels = paper.load_set(run, "a9a")
    assert features.shape == (60, 40)  # a feature that is never there is dropped
    assert set(labels) == {-1.0, 1.0}
    assert paper.load_set(run, "w8a") is None
    paper.logistic_regression(run, list(paper.LIBSVM))
    ours = [m for m in run.measures if (m.method, m.metric) == (paper.OURS, "unsolved regressions")]
    assert [m.setting["data"] for m in ours] == ["a9a", "mushrooms"]
    assert all(m.value == 0 for m in ours)
    with pytest.raises(MissingData, match="a9a"):
        paper.load_set(Run(scale="paper", seeds=(0,), data=tmp_path / "libsvm"), "w8a")


def test_paper_scale_takes_problems_from_the_cutest_interface(monkeypatch):
    def import_problem(name):
        instance = hock_schittkowski(name if name in paper.NAMES else "HS28")
        p = instance.problem
        return SimpleNamespace(
            n=p.n,
            m=p.m,
            x0=instance.x0,
            obj=lambda x, gradient=False: (p.fun(x), p.grad(x)) if gradient else p.fun(x),
            cons=lambda x, gradient=False: (p.constr(x), p.jac(x)) if gradient else p.constr(x),
            hess=p.hess,
        )

    monkeypatch.setitem(sys.modules, "pycutest", SimpleNamespace(import_problem=import_problem))
    run = Run(scale="paper", seeds=(0,))
    paper.cutest_problems(run)
    (solved,) = (m for m in run.measures if m.metric == "solved CUTEst problems out of 47")
    assert solved.value == 47


def test_without_the_cutest_interface_the_claim_stays_open(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycutest", None)
    run = Run(scale="paper", seeds=(0,))
    paper.cutest_problems(run)
    assert not run.measures
    assert "not installed" in capsys.readouterr().out
