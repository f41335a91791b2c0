"""What came out lately, as an Atom feed (RFC 4287): one entry for each paper's last run."""

import hashlib
import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from urllib.parse import urlencode
from xml.etree.ElementTree import Element, SubElement, tostring

from locally.evidence import Paper
from locally.page.glance import LastRun

ATOM = "http://www.w3.org/2005/Atom"
ENTRIES = 50
UNSPEAKABLE = re.compile("[^\t\n\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2, without CR


def atom(papers: Sequence[Paper], last: Mapping[str, LastRun], base: str, wing: str = "") -> bytes:
    """The newest verdicts first.

    Args:
        papers: those that the feed covers.
        last: last run by slug.
        base: address of the page, with a slash at its end.
        wing: name of the wing that the papers were chosen by, "" for all.
    """
    feed = Element("feed", xmlns=ATOM)
    ran = sorted((p for p in papers if p.slug in last), key=lambda p: last[p.slug].started, reverse=True)[:ENTRIES]
    chosen = f"?{urlencode({'wing': wing})}" if wing else ""
    _text(feed, "id", _identity("feed", wing))
    _text(feed, "title", f"Locally: {wing}" if wing else "Locally: daily papers that run")
    _text(feed, "subtitle", "Verdicts on papers' claims, computed from runs")
    _text(feed, "updated", last[ran[0].slug].started if ran else datetime.fromtimestamp(0, UTC).isoformat())
    _text(SubElement(feed, "author"), "name", "Locally")
    SubElement(feed, "link", rel="self", type="application/atom+xml", href=f"{base}feed.atom{chosen}")
    SubElement(feed, "link", rel="alternate", type="text/html", href=f"{base}{chosen}")
    for paper in ran:
        run = last[paper.slug]
        entry = SubElement(feed, "entry")
        _text(entry, "id", _identity("run", paper.slug, run.started))
        _text(entry, "title", f"{run.label}: {paper.title}")
        _text(entry, "updated", run.started)
        SubElement(entry, "link", rel="alternate", type="text/html", href=f"{base}papers/{paper.slug}")
        if paper.arxiv:
            SubElement(entry, "link", rel="related", href=f"https://arxiv.org/abs/{paper.arxiv}")
        for name in paper.authors:
            _text(SubElement(entry, "author"), "name", name)
        for term in (paper.wing, run.label):
            SubElement(entry, "category", term=term)
        _text(entry, "summary", f"{run.reason}\n\n{paper.summary}")
    return tostring(feed, encoding="utf-8", xml_declaration=True)


def entity_tag(body: bytes) -> str:
    """By which a feed reader asks whether anything is new."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def _identity(*parts: str) -> str:
    """The same whatever name the page is called by."""
    return uuid.uuid5(uuid.NAMESPACE_URL, "\n".join(("locally", *parts))).urn


def _text(parent: Element, tag: str, text: str) -> None:
    SubElement(parent, tag).text = UNSPEAKABLE.sub("", text)
