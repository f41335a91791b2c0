"""The spine: what a paper claims, what a run records, and the verdict that follows from the records.

Everything above the methods speaks these few types; all of them turn into JSON and back.
"""

from locally.evidence.claims import (
    CONFIDENCE,
    Claim,
    Finding,
    Measure,
    Outcome,
    Paper,
    Relation,
    Scale,
    Setting,
    Status,
    Verdict,
    Work,
    average,
    interval,
    judge,
    show_interval,
)
from locally.evidence.runs import Evidence, Figure, MissingData, Run

__all__ = [
    "CONFIDENCE",
    "Claim",
    "Evidence",
    "Figure",
    "Finding",
    "Measure",
    "MissingData",
    "Outcome",
    "Paper",
    "Relation",
    "Run",
    "Scale",
    "Setting",
    "Status",
    "Verdict",
    "Work",
    "average",
    "interval",
    "judge",
    "show_interval",
]
