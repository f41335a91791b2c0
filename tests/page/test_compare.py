"""Two runs side by side: what either has is there, and what differs is told."""

import math
from dataclasses import replace

from locally.evidence import Claim, Measure, Relation, Scale, judge
from locally.page.compare import ROWS, compare
from tests.page.test_store import CLAIM, evidence

OTHER = Claim("t", "seconds", "ours", Relation.AT_MOST, 9.0, "Theorem 2")


def run(*measures: Measure, claims=(CLAIM,), **other):
    return evidence(measures=measures, verdict=judge(list(claims), measures, Scale.QUICK), **other)


def test_means_over_seeds_and_settings_and_their_difference():
    a = run(Measure("ours", "error", 1.0, 0, {"n": 1}), Measure("ours", "error", 3.0, 0, {"n": 2}),
            Measure("ours", "error", 4.0, 1))  # fmt: skip
    b = run(Measure("ours", "error", 1.5, 0), Measure("theirs", "error", 7.0, 0))
    ours, theirs = compare(a, b).measures
    assert (ours.values, ours.difference, ours.percent) == (("3", "1.5"), "-1.5", "-50.0%")
    assert (theirs.values, theirs.difference, theirs.percent) == (("", "7"), "", "")


def test_what_cannot_be_compared_is_shown_without_a_difference():
    values = (0.0, math.inf, math.nan)
    a = run(*(Measure("ours", f"m{i}", v, 0) for i, v in enumerate(values)))
    b = run(*(Measure("ours", f"m{i}", v, 0) for i, v in enumerate((1.0, math.inf, 2.0))))
    rows = compare(a, b).measures
    assert [(r.difference, r.percent) for r in rows] == [("+1", ""), ("", ""), ("", "")]


def test_claims_of_either_run_have_a_row():
    a = run(Measure("ours", "error", 0.5, None))
    b = run(Measure("ours", "error", 2.0, None), Measure("ours", "seconds", 1.0, None), claims=(CLAIM, OTHER))
    first, second = compare(a, b).claims
    assert (first.measured, first.kinds) == (("0.5", "2"), ("holds", "fails"))
    assert (second.statement, second.labels) == ("t", ("", "holds"))


def test_versions_that_differ_are_marked():
    a, b = evidence(), evidence(versions={"numpy": "2.1", "torch": "2.13"}, git_revision="f00")
    facts = {f.name: f for f in compare(a, b).facts}
    assert facts["numpy"].differs
    assert facts["torch"].values == ("", "2.13")
    assert not facts["Revision"].differs


def test_a_run_beside_itself_differs_nowhere():
    one = evidence()
    found = compare(one, replace(one))
    assert not any(f.differs for f in found.facts)
    assert {m.difference for m in found.measures} <= {"same", ""}


def test_very_many_measures_are_cut_and_counted():
    many = run(*(Measure("ours", f"m{i}", 1.0, 0) for i in range(ROWS + 7)))
    assert (len(compare(many, many).measures), compare(many, many).left_out) == (ROWS, 7)
