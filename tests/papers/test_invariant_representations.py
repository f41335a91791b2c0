"""The experiment at quick scale, its full-size parts on small input, and its loader on a small file of the format."""

import numpy as np
import pytest

from locally.catalogue import BUILT_IN, read_card
from locally.errors import UsageError
from locally.evidence import Outcome, Run, judge
from locally.papers import invariant_representations as paper

SEEDS = (3, 4)


def values(run, method, metric, **setting):
    return [
        m.value
        for m in run.measures
        if (m.method, m.metric) == (method, metric) and setting.items() <= dict(m.setting).items()
    ]


def test_card_can_be_judged_on_what_the_experiment_records(quick):
    card = read_card(BUILT_IN / "invariant_representations.toml")
    recorded = {(m.method, m.metric) for m in quick.measures}
    assert all((c.method, c.metric) in recorded for c in card.claims if c.scale != "paper")
    verdict = judge(card.claims, quick.measures, quick.scale)
    assert not any(f.outcome is Outcome.FAILS for f in verdict.findings)
    assert {f.name for f in quick.figures} == {"bounds", "risks"}


def test_violations_vanish_with_environments(quick):
    for d in (8, 24):
        metric = f"violated share of unseen interventions, {d} covariates"
        few, many = (np.mean(values(quick, paper.SUBSET, metric, environments=n)) for n in (1, 16))
        assert many < 0.1 * few


def test_invariance_costs_risk_inside_the_law_and_saves_it_outside(quick):
    inside, outside = "mean risk", "95 % quantile of risk, strong interventions"
    assert np.mean(values(quick, paper.SUBSET, inside)) > np.mean(values(quick, paper.ERM, inside))
    assert np.mean(values(quick, paper.SUBSET, outside)) < np.mean(values(quick, paper.ERM, outside))


def test_every_method_is_recorded_on_every_quartile(quick):
    for method in (paper.ERM, paper.AUTOMATIC, paper.IRM, paper.ICP, paper.ANCHOR):
        found = values(quick, method, "error / variance, held-out age quartile")
        assert len(found) == 4
        assert np.isfinite(found).all()


def test_the_same_seeds_give_the_same_records():
    first, second = (Run(scale="quick", seeds=[5]) for _ in range(2))
    for run in (first, second):
        paper.mixtures(run)
        paper.dimensions(run)
    assert first.measures == second.measures


def test_slope_stops_where_no_violation_is_seen():
    slope = paper.log_slope((1, 2, 4, 8, 16), np.array([0.8, 0.4, 0.2, 0.0, 0.1]))
    assert slope == pytest.approx(-1)
    assert np.isnan(paper.log_slope((1, 2, 4), np.array([0.8, 0.4, 0.0])))


def test_families_study_runs_on_one_cell(monkeypatch):
    monkeypatch.setattr(paper, "FAMILIES", [(2, 3)])
    run = Run(scale="paper", seeds=[0])
    paper.families(run, environments=(4, 8), models=1)
    assert len(values(run, paper.SUBSET, "violated share, 100 covariates", sites=2, in_degree=3)) == 2


def test_protein_study_reads_a_table_of_conditions(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["raf,mek,erk,condition"]
    for condition in ("none", "inhibitor", "activator"):
        scale = rng.uniform(0.5, 2)
        for _ in range(30):
            a = scale * rng.standard_normal()
            b = a + rng.standard_normal()
            lines.append(f"{a:.5f},{b:.5f},{b + rng.standard_normal():.5f},{condition}")
    (tmp_path / "cytometry.csv").write_text("\n".join(lines) + "\n")
    run = Run(scale="paper", seeds=[0], data=tmp_path)
    paper.proteins(run)
    metric = "error / variance, held-out condition"
    assert len(values(run, paper.SUBSET, metric)) == len(values(run, paper.ERM, metric)) == 9
    assert len(values(run, paper.ERM, metric, protein="mek", condition="none")) == 1
    (tmp_path / "cytometry.csv").write_text("raf,condition\n1.0,none\n")
    with pytest.raises(ValueError, match="three columns"):
        paper.read_conditions(tmp_path / "cytometry.csv")


def test_missing_table_is_a_message_not_a_crash():
    with pytest.raises(UsageError, match="cytometry"):
        paper.proteins(Run(scale="paper", seeds=[0]))
