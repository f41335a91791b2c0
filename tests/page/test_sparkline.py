"""The small drawing says where the claim's quantity went, and where it should have stayed."""

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locally.evidence import Claim, Finding, Outcome, Relation
from locally.page.sparkline import HEIGHT, WIDTH, sparkline

CLAIM = Claim("s", "error <b>", "ours & theirs", Relation.AT_MOST, 1.0, "Theorem 1")


def findings(*values: float, claim: Claim = CLAIM) -> list[Finding]:
    return [Finding(claim, Outcome.HOLDS, v, v, v) for v in values]


def points(drawn: str) -> list[tuple[float, float]]:
    line = ElementTree.fromstring(drawn).find("polyline")
    return [tuple(map(float, p.split(","))) for p in line.get("points").split()]


def test_it_rises_where_the_values_rise():
    heights = [y for _, y in points(sparkline(findings(0.1, 0.5, 0.9)))]
    assert heights == sorted(heights, reverse=True)  # downwards is positive in SVG


def test_it_says_in_words_what_it_shows():
    title = ElementTree.fromstring(sparkline(findings(0.5, 0.25))).find("title").text
    assert title == "error <b> of ours & theirs over the last 2 runs: 0.5 to 0.25, claimed <= 1"


@pytest.mark.parametrize("values", [(), (1.0,), (math.nan, 1.0), (math.inf, 2.0)])
def test_one_value_is_no_line(values):
    assert sparkline(findings(*values)) == ""


@given(st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=20))
def test_it_stays_inside(values):
    between = Claim("s", "m", "o", Relation.BETWEEN, (-1.0, 1.0), "T")
    for x, y in points(sparkline(findings(*values, claim=between))):
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT
