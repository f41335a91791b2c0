"""The experiment at quick scale, its full-size parts on small input, and its loader on a small file of the format."""

import numpy as np
import pytest

from locally.catalogue import BUILT_IN, read_card
from locally.errors import UsageError
from locally.evidence import Outcome, Run, judge
from locally.papers import ldp_sparse_regression as paper

SEEDS = (7, 8)

pytestmark = pytest.mark.filterwarnings("ignore::locally.privacy.regression.NotPrivateWarning")

ROWS = """-122.23,37.88,41.0,880.0,129.0,322.0,126.0,8.3252,452600.0
-122.22,37.86,21.0,7099.0,1106.0,2401.0,1138.0,8.3014,358500.0
-122.24,37.85,52.0,1467.0,190.0,496.0,177.0,7.2574,352100.0
"""


def values(run, method, metric):
    return [m.value for m in run.measures if (m.method, m.metric) == (method, metric)]


def test_card_can_be_judged_on_what_the_experiment_records(quick):
    card = read_card(BUILT_IN / "ldp_sparse_regression.toml")
    verdict = judge(card.claims, quick.measures, quick.scale)
    assert all(f.seeds == 2 for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE)
    assert not any(f.outcome is Outcome.FAILS for f in verdict.findings)
    assert len({f.name for f in quick.figures}) == 3


def test_the_same_seeds_give_the_same_records():
    first, second = (Run(scale="quick", seeds=[3]) for _ in range(2))
    for run in (first, second):
        paper.patients(run)
        paper.audit(run)
    assert first.measures == second.measures


def test_damaged_reports_are_counted_and_left_out(quick):
    assert values(quick, paper.PUBLIC, "damaged reports that were averaged in") == [0.0, 0.0]
    assert values(quick, paper.PUBLIC, "reports rejected") == [400.0, 400.0]


def test_thresholding_and_public_features_order_the_slopes(quick):
    metric = "slope of log error over log dimension"
    nldp, public, raw = (np.mean(values(quick, m, metric)) for m in (paper.NLDP, paper.PUBLIC, paper.RAW))
    assert raw > nldp + 0.2 > public + 0.4


def test_streamed_study_runs_on_a_small_town():
    run = Run(scale="paper", seeds=[0])
    paper.streamed_users(run, sizes=(20_000, 40_000), dimensions=(5,))
    assert len(values(run, paper.IHT, "l2 error, streamed users")) == 2
    assert np.isfinite(values(run, paper.PUBLIC, "slope of log error over log users, individual messages")).all()


def test_housing_study_reads_the_archive_file(tmp_path):
    file = tmp_path / "california_housing" / "cal_housing.data"
    file.parent.mkdir()
    rng = np.random.default_rng(0)
    noisy = [np.array([float(c) for c in row.split(",")]) for row in ROWS.splitlines()]
    rows = [noisy[i % 3] * rng.uniform(0.8, 1.2, 9) for i in range(60)]
    file.write_text("\n".join(",".join(f"{v:.6f}" for v in row) for row in rows) + "\n")
    run = Run(scale="paper", seeds=[0], data=tmp_path)
    paper.housing(run, n=2_000)
    assert len(values(run, paper.IHT, "R^2 on held-out districts")) == 4
    file.write_text("1,2,3\n")
    with pytest.raises(ValueError, match="nine columns"):
        paper.read_housing(file)


def test_housing_features_are_the_usual_eight(tmp_path):
    file = tmp_path / "cal_housing.data"
    file.write_text(ROWS)
    X, y = paper.read_housing(file)
    raw = np.array([8.3252, 8.3014, 7.2574])
    np.testing.assert_allclose(X[:, 0], (raw - raw.mean()) / raw.std())
    rooms = np.array([880 / 126, 7099 / 1138, 1467 / 177])
    np.testing.assert_allclose(X[:, 2], (rooms - rooms.mean()) / rooms.std())
    assert y.shape == (3,)


def test_missing_table_is_a_message_not_a_crash():
    with pytest.raises(UsageError, match="cal_housing"):
        paper.housing(Run(scale="paper", seeds=[0]))
