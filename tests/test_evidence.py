"""A verdict is computed from the records: order and units do not matter, NaN never holds, one seed never decides."""

import math
import os
import random
import subprocess
import sys
import time

import psutil
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from locally.evidence import (
    Claim,
    Evidence,
    Finding,
    Measure,
    Outcome,
    Relation,
    Run,
    Scale,
    Status,
    Verdict,
    interval,
    judge,
)
from locally.evidence.kept import Kept

ONE_SIDED = [Relation.AT_MOST, Relation.AT_LEAST, Relation.BELOW, Relation.ABOVE]
finite = st.floats(-1e6, 1e6)


def claim(relation=Relation.AT_MOST, value=1.0, **other) -> Claim:
    given = {"statement": "s", "metric": "error", "method": "ours", "source": "Theorem 1"}
    return Claim(relation=relation, value=value, **given | other)


def records(values, seeds=None) -> list[Measure]:
    seeds = range(len(values)) if seeds is None else seeds
    return [Measure("ours", "error", v, s) for v, s in zip(values, seeds, strict=True)]


@given(st.lists(finite, min_size=2, max_size=8), st.sampled_from(ONE_SIDED), finite, st.randoms())
def test_order_of_records_does_not_matter(values, relation, threshold, shuffler: random.Random):
    measures = records(values)
    shuffled = measures[:]
    shuffler.shuffle(shuffled)
    decided = claim(relation, threshold)
    assert decided.judge(measures, Scale.QUICK) == decided.judge(shuffled, Scale.QUICK)


@given(st.lists(finite, min_size=2, max_size=8), st.sampled_from(ONE_SIDED), finite, st.integers(-20, 20))
def test_units_do_not_matter(values, relation, threshold, power):
    assume(all(v == 0 or abs(v) > 1e-100 for v in values))
    scale = 2.0**power  # exact in floating point
    plain = claim(relation, threshold).judge(records(values), Scale.QUICK)
    scaled = claim(relation, threshold * scale).judge(records([v * scale for v in values]), Scale.QUICK)
    assert plain.outcome is scaled.outcome


@given(st.lists(finite, min_size=1, max_size=5), st.sampled_from(ONE_SIDED), finite, st.integers(0, 5))
def test_a_measure_that_is_not_a_number_never_holds(values, relation, threshold, at):
    values.insert(min(at, len(values)), math.nan)
    assert claim(relation, threshold).judge(records(values), Scale.QUICK).outcome is Outcome.INCONCLUSIVE


@given(finite, st.sampled_from(ONE_SIDED), finite)
def test_one_seed_decides_nothing(value, relation, threshold):
    assert claim(relation, threshold).judge(records([value]), Scale.QUICK).outcome is Outcome.INCONCLUSIVE


@given(finite, finite)
def test_without_a_seed_the_figure_is_exact(value, threshold):
    found = claim(value=threshold).judge([Measure("ours", "error", value)], Scale.QUICK)
    assert found.outcome is (Outcome.HOLDS if value <= threshold else Outcome.FAILS)
    assert (found.low, found.high, found.seeds) == (value, value, 0)


@pytest.mark.parametrize(
    ("relation", "outcome"),
    [
        (Relation.AT_MOST, Outcome.HOLDS),
        (Relation.AT_LEAST, Outcome.HOLDS),
        (Relation.BELOW, Outcome.FAILS),
        (Relation.ABOVE, Outcome.FAILS),
    ],
)
def test_a_tie_satisfies_only_the_relations_with_equality(relation, outcome):
    assert claim(relation, 1.0).judge(records([1.0, 1.0, 1.0]), Scale.QUICK).outcome is outcome


@given(st.lists(finite, min_size=2, max_size=8))
def test_opposite_relations_never_both_hold(values):
    assume(len(set(values)) > 1)
    below, above = (claim(r, 0.0).judge(records(values), Scale.QUICK).outcome for r in (Relation.BELOW, Relation.ABOVE))
    assert not (below is above is Outcome.HOLDS)
    assert (below is Outcome.HOLDS) == (above is Outcome.FAILS)


def test_interval_is_students():
    # with two degrees of freedom the quantile is (2p - 1) / sqrt(2p(1 - p)); the standard deviation is 1
    quantile = 0.95 / math.sqrt(2 * 0.975 * 0.025)
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert high - mean == pytest.approx(quantile / math.sqrt(3), rel=1e-9)
    assert mean - low == pytest.approx(high - mean, rel=1e-12)


def test_between_needs_the_whole_interval_inside():
    inside = claim(Relation.BETWEEN, (0.0, 10.0))
    assert inside.judge(records([4, 5, 6]), Scale.QUICK).outcome is Outcome.HOLDS
    assert inside.judge(records([9, 10, 11]), Scale.QUICK).outcome is Outcome.INCONCLUSIVE
    assert inside.judge(records([99, 100, 101]), Scale.QUICK).outcome is Outcome.FAILS


def test_infinity_on_every_seed_fails_and_on_some_is_inconclusive():
    assert claim().judge(records([math.inf, math.inf]), Scale.QUICK).outcome is Outcome.FAILS
    assert claim().judge(records([0.5, math.inf]), Scale.QUICK).outcome is Outcome.INCONCLUSIVE


def test_several_records_of_one_seed_are_one_observation():
    measures = records([0.0, 1.0, 0.0, 1.0], seeds=[0, 0, 1, 1])
    found = claim().judge(measures, Scale.QUICK)
    assert (found.estimate, found.low, found.high, found.seeds) == (0.5, 0.5, 0.5, 2)


def test_setting_restricts_the_records():
    measures = [Measure("ours", "error", n, s, {"n": n}) for n in (1, 5) for s in (0, 1)]
    assert claim(setting={"n": 1}).judge(measures, Scale.QUICK).outcome is Outcome.HOLDS
    assert claim(setting={"n": 5}).judge(measures, Scale.QUICK).outcome is Outcome.FAILS
    assert claim(setting={"n": 7}).judge(measures, Scale.QUICK).outcome is Outcome.INCONCLUSIVE


def test_mixing_seeded_and_unseeded_records_is_inconclusive():
    found = claim().judge(records([0.1, 0.2], seeds=[None, 0]), Scale.QUICK)
    assert found.outcome is Outcome.INCONCLUSIVE


def test_the_worst_claim_is_the_verdict_and_undecidable_ones_do_not_count():
    holds, fails = claim(value=1.0), claim(value=0.1)
    later = claim(value=-1.0, scale=Scale.PAPER)
    measures = records([0.5, 0.5])
    assert judge([holds, fails], measures, Scale.QUICK).outcome is Outcome.FAILS
    verdict = judge([holds, later], measures, Scale.QUICK)
    assert verdict.outcome is Outcome.HOLDS
    assert verdict.findings[1].label == "needs paper scale"
    assert judge([holds, later], measures, Scale.PAPER).outcome is Outcome.FAILS
    assert judge([later], measures, Scale.QUICK).outcome is Outcome.INCONCLUSIVE
    unmeasured = claim(metric="unheard of")
    assert judge([holds, unmeasured], measures, Scale.QUICK).outcome is Outcome.INCONCLUSIVE
    assert judge([fails, unmeasured], measures, Scale.QUICK).deciding.claim is fails


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=4),
    st.sampled_from(ONE_SIDED),
    st.sampled_from(list(Scale)),
)
def test_findings_and_measures_survive_json(values, relation, scale):
    import json

    measures = records(values)
    for m in measures:
        assert repr(Measure.from_dict(json.loads(json.dumps(m.to_dict(), allow_nan=False)))) == repr(m)
    found = claim(relation, scale=scale).judge(measures, Scale.QUICK)
    again = Finding.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert repr(again) == repr(found)


def test_evidence_prints_the_agreed_object():
    measures = tuple(records([0.5, 0.55]))
    verdict = judge([claim()], measures, Scale.QUICK)
    evidence = Evidence("slug", Scale.QUICK, Status.FINISHED, verdict, measures, (0, 1), "2026-01-01", 1.23456, 99.99)
    shown = evidence.to_dict()
    agreed = {"slug", "scale", "verdict", "reason", "claim", "measures", "seconds", "peak_memory_mib", "versions"}
    assert agreed <= shown.keys()
    assert shown["verdict"] == "holds"
    assert shown["measures"][0] == {"method": "ours", "metric": "error", "value": 0.5, "seed": 0, "setting": {}}


@pytest.mark.parametrize(
    ("relation", "value"),
    [
        (Relation.BETWEEN, 1.0),
        (Relation.BETWEEN, (2.0, 1.0)),
        (Relation.AT_MOST, (1.0, 2.0)),
        (Relation.AT_MOST, math.nan),
    ],
)
def test_a_claim_without_a_usable_threshold_is_refused(relation, value):
    with pytest.raises(ValueError, match="value must be"):
        claim(relation, value)


def test_a_verdict_without_claims_is_inconclusive():
    assert judge([], [], Scale.QUICK) == Verdict(Outcome.INCONCLUSIVE, "every claim needs at least quick scale", ())


class TestRun:
    def test_picks_by_scale(self):
        assert Run(scale="default").pick(quick=1, default=2, paper=3) == 2

    @pytest.mark.parametrize("seeds", [(), (1, 1)])
    def test_refuses_seeds_that_are_no_sample(self, seeds):
        with pytest.raises(ValueError, match="seeds"):
            Run(seeds=seeds)

    def test_nested_progress_never_goes_back_and_ends_at_one(self):
        seen = []
        run = Run(on_progress=lambda fraction, _: seen.append(fraction))
        for _ in run.track(range(3), "outer"):
            for _ in run.track(range(4), "inner"):
                pass
        assert seen == sorted(seen)
        assert seen[-1] == 1.0
        assert seen[2] == pytest.approx(1 / 12)

    def test_leaving_a_track_early_closes_it(self):
        run = Run()
        for _ in run.track(range(3), "outer"):
            break
        seen = []
        run._on_progress = lambda fraction, _: seen.append(fraction)
        list(run.track([1], "next"))
        assert seen == [0.0, 1.0]

    def test_records_numpy_and_torch_scalars_as_plain_numbers(self):
        import numpy as np
        import torch

        run = Run()
        run.record("ours", "error", torch.tensor(0.5), seed=np.int64(3), n=np.int32(7))
        assert run.measures == [Measure("ours", "error", 0.5, 3, {"n": 7})]
        assert type(run.measures[0].setting["n"]) is int

    def test_names_the_missing_data_and_the_option(self, tmp_path):
        from locally.errors import UsageError

        with pytest.raises(UsageError, match="--data DIR"):
            Run().data("mnist/images.gz", "MNIST in IDX form")
        with pytest.raises(UsageError, match=r"images\.gz does not exist"):
            Run(data=tmp_path).data("mnist/images.gz", "MNIST in IDX form")

    def test_the_same_figure_twice_gives_the_same_bytes_in_ink_that_follows_the_page(self):
        drawn = []
        for _ in range(2):
            run = Run()
            for n in (1, 10, 100):
                run.record("ours", "error", 1 / n, n=n)
            run.plot_lines(x="n", y="error", log=True)
            drawn.append(run.figures[0])
        assert drawn[0] == drawn[1]
        assert drawn[0].svg.startswith("<svg")
        assert "currentColor" in drawn[0].svg
        assert drawn[0].pdf.startswith(b"%PDF")
        assert drawn[0].png.startswith(b"\x89PNG")

    def test_refuses_to_plot_what_was_not_recorded(self):
        with pytest.raises(ValueError, match="nothing to plot"):
            Run().plot_bars("error")


def observe(run: Run, seed: int) -> tuple[int, int]:
    """What a process of its own does with one item: records, draws, and says where it was and with how many threads."""
    for _ in run.track(range(2), "within"):
        run.record("ours", "error", seed / 10, seed=seed)
    if seed == 3:
        run.plot_bars("error", name="third")
    return os.getpid(), int(os.environ.get("OMP_NUM_THREADS", "0"))


def stumble(run: Run, seed: int) -> None:
    if seed == 2:
        raise ValueError("seed 2 has no solution")


def dawdle(run: Run, seed: int) -> None:
    (run.scratch / f"{seed}.pid").write_text(str(os.getpid()))
    time.sleep(300)


class TestParallel:
    def test_processes_go_when_the_experiment_is_killed(self, tmp_path):
        code = [
            "from pathlib import Path",
            "from tests.test_evidence import Run, dawdle",
            "if __name__ == '__main__':",
            f"    Run(scratch=Path({str(tmp_path)!r})).parallel(dawdle, (1, 2), 'seeds')",
        ]
        (tmp_path / "parent.py").write_text("\n".join(code))
        environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": os.getcwd()}
        parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], env=environment)
        files = [tmp_path / f"{seed}.pid" for seed in (1, 2)]
        deadline = time.monotonic() + 120
        while not all(f.exists() and f.read_text() for f in files):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        parent.kill()
        parent.wait()
        pids = [int(f.read_text()) for f in files]
        while any(map(psutil.pid_exists, pids)):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def test_two_cores_record_what_one_core_records(self, monkeypatch):
        runs = []
        for cores in ("1", "2"):
            monkeypatch.setenv("OMP_NUM_THREADS", cores)
            seen = []
            run = Run(seeds=(1, 2, 3), on_progress=lambda fraction, _, seen=seen: seen.append(fraction))
            where = run.parallel(observe, run.seeds, "seeds")
            assert seen == sorted(seen)
            assert seen[-1] == 1.0
            assert {threads for _, threads in where} == {1}
            assert (os.getpid() in {pid for pid, _ in where}) == (cores == "1")
            assert os.environ["OMP_NUM_THREADS"] == cores
            runs.append(run)
        assert runs[0].measures == runs[1].measures
        assert runs[0].figures == runs[1].figures
        assert [m.seed for m in runs[1].measures] == [1, 1, 2, 2, 3, 3]

    @pytest.mark.parametrize("cores", ["1", "2"])
    def test_an_error_reaches_the_experiment(self, monkeypatch, cores):
        monkeypatch.setenv("OMP_NUM_THREADS", cores)
        with pytest.raises(ValueError, match="seed 2 has no solution"):
            Run().parallel(stumble, (1, 2, 3), "seeds")

    def test_finished_items_are_found_again_and_damaged_ones_are_not(self, tmp_path):
        first = Kept(tmp_path, 0)
        for index in range(3):
            first.put(index, {"answer": index})
        first.put(3, lambda: None)  # cannot be pickled
        (tmp_path / "0-1.item").write_bytes((tmp_path / "0-1.item").read_bytes()[:-4])
        (tmp_path / "0-2.item").write_bytes(b"")
        assert list(Kept(tmp_path, 0).found(4)) == [(0, {"answer": 0})]
        assert list(Kept(tmp_path, 1).found(4)) == []
        assert list(Kept(None, 0).found(4)) == []
