"""What came out lately, as an Atom feed (RFC 4287): one entry for each paper's last run."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from xml.etree.ElementTree import Element, SubElement, tostring

from locally.evidence import Paper
from locally.page.glance import LastRun

ATOM = "http://www.w3.org/2005/Atom"
ENTRIES = 50


def atom(papers: Sequence[Paper], last: Mapping[str, LastRun], base: str, wing: str = "") -> bytes:
    """The newest verdicts first.

    Args:
        papers: those that the feed covers.
        last: last run by slug.
        base: address of the page, with a slash at its end.
        wing: name of the wing that the papers were chosen by, "" for all.
    """
    feed = Element("feed", xmlns=ATOM)
    title = f"Locally: {wing}" if wing else "Locally: daily papers that run"
    ran = sorted((p for p in papers if p.slug in last), key=lambda p: last[p.slug].started, reverse=True)[:ENTRIES]
    here = f"{base}feed.atom" + (f"?wing={wing}" if wing else "")
    _text(feed, "id", here)
    _text(feed, "title", title)
    _text(feed, "updated", last[ran[0].slug].started if ran else datetime.fromtimestamp(0, UTC).isoformat())
    _text(SubElement(feed, "author"), "name", "Locally")
    SubElement(feed, "link", rel="self", href=here)
    SubElement(feed, "link", rel="alternate", href=base)
    for paper in ran:
        run = last[paper.slug]
        entry = SubElement(feed, "entry")
        _text(entry, "id", f"{base}papers/{paper.slug}#{run.started}")
        _text(entry, "title", f"{run.label}: {paper.title}")
        _text(entry, "updated", run.started)
        SubElement(entry, "link", rel="alternate", href=f"{base}papers/{paper.slug}")
        for name in paper.authors:
            _text(SubElement(entry, "author"), "name", name)
        SubElement(entry, "category", term=paper.wing)
        _text(entry, "summary", f"{run.reason}\n\n{paper.summary}")
    return tostring(feed, encoding="utf-8", xml_declaration=True)


def _text(parent: Element, tag: str, text: str) -> None:
    SubElement(parent, tag).text = "".join(c for c in text if c >= " " or c in "\t\n")
