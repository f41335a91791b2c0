"""What a study will take: the nearest run counts, the card leads on from it, and a range says how sure that is."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locally import catalogue
from locally.evidence import Evidence, Outcome, Scale, Status, Verdict, Work
from locally.evidence.estimates import EFFICIENCY, RECENT, Range, estimate

QUICK, DEFAULT, PAPER = Scale
HERE, ELSEWHERE = {"processor": "this", "cores": 2}, {"processor": "other", "cores": 64}
WORK = Work({QUICK: 0.5, DEFAULT: 1.0, PAPER: 100.0}, {QUICK: 0.5, DEFAULT: 1.0, PAPER: 4.0})
some = st.floats(0.1, 1e6)


def run(scale=DEFAULT, seconds=10.0, memory=100.0, seeds=5, status=Status.FINISHED, device="cpu", machine=HERE):
    verdict = Verdict(Outcome.HOLDS, "")
    return Evidence(
        slug="s",
        scale=scale,
        status=status,
        verdict=verdict,
        measures=(),
        seeds=tuple(range(seeds)),
        started="",
        seconds=seconds,
        peak_memory_mib=memory,
        device=device,
        machine=machine,
    )


def of(*stored, work=WORK, scale=PAPER, seeds=10, **other):
    return estimate(work, stored, scale=scale, seeds=seeds, machine=HERE, **other)


def test_the_same_study_again_takes_as_long_seed_by_seed():
    found = of(run(PAPER, 100.0, 500.0, seeds=5), work=None)
    assert found.seconds.likely == 200.0
    assert found.memory_mib.likely == 500.0
    assert found.seconds.high / found.seconds.low < 2.5
    assert found.basis == "from 1 run at paper scale"


def test_the_card_leads_on_from_another_scale():
    found = of(run(DEFAULT, 10.0, 100.0, seeds=5))
    assert (found.seconds.likely, found.memory_mib.likely) == (2000.0, 400.0)
    assert found.basis == "from 1 run at default scale and the sizes on its card"
    assert of(run(QUICK, 3.0, 60.0, seeds=3), scale=DEFAULT, seeds=5).seconds.likely == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("nearest", "others"),
    [
        (run(PAPER), [run(DEFAULT), run(QUICK)]),
        (run(PAPER, machine=ELSEWHERE), [run(DEFAULT)]),
        (run(DEFAULT), [run(QUICK), run(DEFAULT, machine=ELSEWHERE)]),
        (run(QUICK), [run(DEFAULT, machine=ELSEWHERE)]),
        (run(DEFAULT), [run(QUICK), run(PAPER, status=Status.CRASHED), run(PAPER, seconds=0.0)]),
        (run(DEFAULT), [run(DEFAULT, device="cuda:0")]),
    ],
)
def test_the_nearest_run_counts(nearest, others):
    alone = of(nearest)
    assert of(nearest, *others) == of(*others, nearest) == alone


def test_a_device_counts_before_the_machine():
    stored = run(DEFAULT, 10.0), run(DEFAULT, 2.0, device="cuda:0", machine=ELSEWHERE)
    assert of(*stored, device="cuda:0").seconds.likely == 400.0
    assert of(stored[0], device="cuda:0").basis == "from 1 run at default scale on cpu and the sizes on its card"


def test_of_many_runs_the_newest_count_and_one_slow_one_does_not():
    stored = [run(PAPER, 1000.0, seeds=10)] * 9 + [run(PAPER, s, seeds=10) for s in (10.0, 11.0, 900.0, 12.0, 10.5)]
    assert RECENT == 5
    assert of(*stored).seconds.likely == 11.0


def test_what_ran_elsewhere_says_so_and_less():
    here, elsewhere = of(run()), of(run(machine=ELSEWHERE))
    assert "on another machine" in elsewhere.basis
    assert elsewhere.seconds.low < here.seconds.low < here.seconds.high < elsewhere.seconds.high


def test_nothing_is_made_up():
    assert of() is None
    assert of(run(DEFAULT), work=None) is None
    assert of(run(PAPER, status=Status.TIMED_OUT)) is None


def test_networks_of_full_size_go_at_the_speed_of_the_device():
    networks = Work(WORK.time, WORK.memory, operations=(2e12, 1e12))
    found = of(run(DEFAULT, 10.0, seeds=5), work=networks, rate=lambda: 1e9)
    assert found.seconds.likely == pytest.approx(2000.0 + 12e12 / (EFFICIENCY * 1e9))
    assert of(run(DEFAULT), work=networks, scale=QUICK, rate=lambda: 0.0) is not None  # nobody asks for the rate
    assert of(run(PAPER, 7.0, seeds=10), work=networks, rate=lambda: 0.0).seconds.likely == 7.0


@given(seconds=some, memory=some, seeds=st.integers(1, 20), more=st.integers(1, 20), scale=st.sampled_from(Scale))
def test_ranges_hold_the_figure_and_grow_with_the_seeds(seconds, memory, seeds, more, scale):
    found = of(run(scale, seconds, memory), seeds=seeds)
    for figure in (found.seconds, found.memory_mib):
        assert 0 < figure.low <= figure.likely <= figure.high < math.inf
    larger = of(run(scale, seconds, memory), seeds=seeds + more)
    assert larger.seconds.likely == pytest.approx(found.seconds.likely * (seeds + more) / seeds)
    assert larger.memory_mib == found.memory_mib


@given(a=some, b=some, factor=st.floats(1, 10))
def test_ranges_add(a, b, factor):
    both = Range.around(a, factor) + Range.around(b, factor)
    assert both.likely == a + b
    assert both.high == pytest.approx((a + b) * factor)


@pytest.mark.parametrize("paper", catalogue.load([catalogue.BUILT_IN]), ids=lambda p: p.slug)
def test_every_paper_tells_its_size(paper):
    for measured in Scale:
        found = estimate(paper.work, [run(measured)], scale=PAPER, seeds=10, machine=HERE, rate=lambda: 1e11)
        assert found is not None
        assert 0 < found.seconds.low < found.seconds.high < math.inf
    for scale, next_scale in ((QUICK, DEFAULT),):  # none but those that leave the small models out
        assert paper.work.time[scale] < paper.work.time[next_scale]
