"""The capacity plan: what a store needs is measured on real rows, and the plan grows as it says."""

import pytest

from docs import capacity
from locally.evidence import Evidence, Figure, Measure, Outcome, Scale, Status, Verdict
from locally.page.store import Store


def evidence(slug: str, scale: Scale = Scale.DEFAULT, status: Status = Status.FINISHED, measures: int = 40) -> Evidence:
    return Evidence(
        slug=slug,
        scale=scale,
        status=status,
        verdict=Verdict(Outcome.HOLDS, "so it is"),
        measures=tuple(Measure("method", "metric", float(i), i % 4, {"n": i}) for i in range(measures)),
        seeds=(0, 1, 2, 3),
        started="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        peak_memory_mib=100.0,
        figures=(Figure("a figure", "its caption", "<svg/>" * 5000, b"p" * 20_000, b"n" * 50_000),),
    )


def test_only_newest_finished_runs_at_default_scale_are_measured(tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'runs.sqlite'}")
    for run in (
        evidence("one", measures=10),
        evidence("one", measures=40),
        evidence("two", measures=20),
        evidence("quick", scale=Scale.QUICK),
        evidence("crashed", status=Status.CRASHED),
    ):
        store.add(run)
    found = capacity.measure(store, copies=20)
    assert (found.papers, found.seeds, found.measures, found.figures) == (2, 4, 30, 1)
    assert found.figure_bytes == 30_000 + 20_000 + 50_000
    assert 30 * 20 < found.other_bytes < 30_000  # rows of measures, and pages that are not full
    assert 0 < found.read_seconds < 1
    assert 0 < found.write_seconds < 1


def test_the_plan_is_proportional_to_papers_and_time_to_seeds():
    one, ten, more_seeds = capacity.night(100, 10), capacity.night(1000, 10), capacity.night(100, 20)
    assert ten.core_hours == pytest.approx(10 * one.core_hours)
    assert ten.rows == pytest.approx(10 * one.rows)
    assert more_seeds.core_hours == pytest.approx(2 * one.core_hours)
    assert one.rows < more_seeds.rows < 2 * one.rows  # the run itself and its figures are there once
    assert one.without_figures < one.gigabytes


def test_the_page_shows_the_plan():
    assert "10,000 papers" in capacity.per_night()
    assert "Milliseconds to write a run" in capacity.basis()
