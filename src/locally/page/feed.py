"""What is new, as an Atom feed (RFC 4287): one entry for each paper's last run, and one for each paper fetched."""

import hashlib
import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from urllib.parse import urlencode
from xml.etree.ElementTree import Element, SubElement, tostring

from locally.evidence import Paper
from locally.page.glance import LastRun
from locally.page.preprints import Preprint

ATOM = "http://www.w3.org/2005/Atom"
ENTRIES = 50
UNSPEAKABLE = re.compile("[^\t\n\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2, without CR


def atom(
    papers: Sequence[Paper],
    last: Mapping[str, LastRun],
    base: str,
    wing: str = "",
    fetched: Sequence[Preprint] = (),
) -> bytes:
    """The newest first; so many verdicts and so many fetched papers, that neither push the others out.

    Args:
        papers: those that the feed covers.
        last: last run by slug.
        base: address of the page, with a slash at its end.
        wing: name of the wing that the papers were chosen by, "" for all.
        fetched: papers from elsewhere that the feed covers.
    """
    feed = Element("feed", xmlns=ATOM)
    entries = _newest([_verdict(p, last[p.slug], base) for p in papers if p.slug in last])
    entries = _newest(entries + _newest([_fetched(p, base) for p in fetched]), 2 * ENTRIES)
    chosen = f"?{urlencode({'wing': wing})}" if wing else ""
    _text(feed, "id", _identity("feed", wing))
    _text(feed, "title", f"Locally: {wing}" if wing else "Locally: daily papers that run")
    _text(feed, "subtitle", "Verdicts on papers' claims, computed from runs")
    _text(feed, "updated", entries[0][0] if entries else datetime.fromtimestamp(0, UTC).isoformat())
    _text(SubElement(feed, "author"), "name", "Locally")
    SubElement(feed, "link", rel="self", type="application/atom+xml", href=f"{base}feed.atom{chosen}")
    SubElement(feed, "link", rel="alternate", type="text/html", href=f"{base}{chosen}")
    feed.extend(entry for _, entry in entries)
    return tostring(feed, encoding="utf-8", xml_declaration=True)


def _newest(entries: list[tuple[str, Element]], limit: int = ENTRIES) -> list[tuple[str, Element]]:
    return sorted(entries, key=lambda entry: entry[0], reverse=True)[:limit]


def _verdict(paper: Paper, run: LastRun, base: str) -> tuple[str, Element]:
    """When it came out, and what is told of it."""
    entry = _entry(_identity("run", paper.slug, run.started), run.started, f"{base}papers/{paper.slug}", paper.arxiv)
    _describe(entry, f"{run.label}: {paper.title}", paper.authors, (paper.wing, run.label))
    _text(entry, "summary", f"{run.reason}\n\n{paper.summary}")
    return run.started, entry


def _fetched(preprint: Preprint, base: str) -> tuple[str, Element]:
    """A paper to read; another version of it is news of the same entry."""
    entry = _entry(_identity("paper", preprint.key), preprint.updated, f"{base}papers/{preprint.key}", preprint.arxiv)
    _describe(entry, preprint.title, preprint.authors, preprint.categories)
    _text(entry, "summary", preprint.summary)
    return preprint.updated, entry


def _entry(identity: str, updated: str, address: str, arxiv: str) -> Element:
    entry = Element("entry")
    _text(entry, "id", identity)
    _text(entry, "updated", updated)
    SubElement(entry, "link", rel="alternate", type="text/html", href=address)
    if arxiv:
        SubElement(entry, "link", rel="related", href=f"https://arxiv.org/abs/{arxiv}")
    return entry


def _describe(entry: Element, title: str, authors: Sequence[str], terms: Sequence[str]) -> None:
    _text(entry, "title", title)
    for name in authors:
        _text(SubElement(entry, "author"), "name", name)
    for term in terms:
        SubElement(entry, "category", term=UNSPEAKABLE.sub("", term))


def entity_tag(body: bytes) -> str:
    """By which a feed reader asks whether anything is new."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def _identity(*parts: str) -> str:
    """The same whatever name the page is called by."""
    return uuid.uuid5(uuid.NAMESPACE_URL, "\n".join(("locally", *parts))).urn


def _text(parent: Element, tag: str, text: str) -> None:
    SubElement(parent, tag).text = UNSPEAKABLE.sub("", text)
