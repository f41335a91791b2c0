"""The experiment at quick scale: its claims hold, its full-size parts run, its figures are there."""

import tomllib
from pathlib import Path

import numpy as np
import pytest

from locally.evidence import Claim, Outcome, Run, Scale, judge
from locally.papers import small_gain_nash as paper


@pytest.fixture(scope="module")
def card():
    return tomllib.loads(Path(paper.__file__).with_suffix(".toml").read_text())


def test_quick_experiment_bears_out_its_claims(card):
    run = Run(scale="quick", seeds=(100, 101))
    paper.experiment(run)
    verdict = judge([Claim.from_dict(claim) for claim in card["claims"]], run.measures, Scale.QUICK)
    assert verdict.outcome is Outcome.HOLDS, verdict.reason
    assert [figure.name for figure in run.figures] == ["margins and steps", "contraction"]


def test_full_size_parts_record_what_their_claims_read(card):
    """Network games of 1000 players, the ratio sweep and the noise sweep, each once."""
    run = Run(scale="paper", seeds=(7,))
    rng = np.random.default_rng(7)
    paper.network_games(run, 7, rng)
    claims = [Claim.from_dict(c) for c in card["claims"] if c.get("scale") == "paper"]
    assert claims
    for claim in claims:
        found = [m for m in run.measures if m.metric == claim.metric and claim.setting.items() <= m.setting.items()]
        assert found
        assert all(m.value <= claim.value for m in found)


def test_noise_makes_norms_lose_what_signs_keep():
    run = Run(scale="default", seeds=(3,))
    rng = np.random.default_rng(3)
    paper.structured_noise(run, 3, paper.orthogonal(rng), rng)
    margins = {(m.method, m.setting["noise"]): m.value for m in run.measures}
    assert margins[paper.SIGNED, 0.0] == pytest.approx(margins[paper.SGN, 0.0], abs=1e-6)
    assert margins[paper.SIGNED, 1.0] > margins[paper.SGN, 1.0] + 0.01
    assert all(margins[paper.ROSEN, share] < 0 for share in (0.0, 0.5, 1.0))


def test_card_example_runs(card, capsys):
    exec(card["example"], {})
    assert "timescale band" in capsys.readouterr().out
