"""Hugging Face's daily papers: addresses to ask for, and the JSON that it answers with."""

import json
from collections.abc import Iterator
from datetime import date
from typing import Any
from urllib.parse import urlencode

from locally.page.fetch.parsed import Malformed, Parsed
from locally.page.preprints import (
    AUTHORS,
    HUGGING_FACE,
    LABELS,
    NAME,
    SUMMARY,
    TITLE,
    Preprint,
    identify,
    instant,
    plain,
)

BASE = "https://huggingface.co/api/daily_papers"
PAGE = 100  # entries asked for at once
MOST_UPVOTES = 10**7


def addresses(base: str, day: date, limit: int) -> Iterator[str]:
    """Pages of what was featured on one day."""
    for page in range(-(-limit // PAGE)):
        yield f"{base}?{urlencode({'date': day.isoformat(), 'limit': PAGE, 'p': page})}"


def parse(body: bytes) -> Parsed:
    """Entries of one page; those that cannot be kept are told in `refused`.

    Raises:
        Malformed: this is no list of papers.
    """
    try:
        listed = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse)
    except (ValueError, RecursionError) as problem:
        raise Malformed(f"not JSON: {str(problem)[:200]}") from None
    if not isinstance(listed, list):
        raise Malformed(f"expected a list of papers, got {type(listed).__name__}")
    parsed = Parsed(len(listed))
    for entry in listed:
        try:
            parsed.found.append(_preprint(entry))
        except ValueError as problem:
            parsed.refused.append(str(problem))
    return parsed


def _preprint(entry: Any) -> Preprint:
    entry = _kind(entry, dict, "an entry")
    paper = _kind(entry.get("paper"), dict, "paper")
    known = identify(_kind(paper.get("id"), str, "paper.id"))
    if known is None:
        raise ValueError(f"no arXiv id: {plain(paper['id'], 80)!r}")
    key, version = known
    title = plain(_kind(paper.get("title") or entry.get("title"), str, "title"), TITLE)
    if not title:
        raise ValueError(f"{key} has no title")
    published = instant(_kind(paper.get("publishedAt") or entry.get("publishedAt"), str, "publishedAt"))
    featured = paper.get("submittedOnDailyAt") or entry.get("publishedAt") or published
    organisation = paper.get("organization") or entry.get("organization") or {}
    organisation = _kind(organisation, dict, "organization")
    return Preprint(
        key=key,
        version=version,
        title=title,
        authors=tuple(_names(paper.get("authors"))),
        summary=plain(_kind(paper.get("summary") or entry.get("summary") or "", str, "summary"), SUMMARY),
        keywords=tuple(
            word for k in _listed(paper.get("ai_keywords"))[:LABELS] if isinstance(k, str) and (word := plain(k, 80))
        ),
        organisation=plain(_kind(organisation.get("fullname") or organisation.get("name") or "", str, "name"), NAME),
        published=published,
        updated=published,
        day=instant(_kind(featured, str, "submittedOnDailyAt"))[:10],
        upvotes=_count(paper.get("upvotes")),
        sources=(HUGGING_FACE,),
    )


def _names(authors: Any) -> Iterator[str]:
    for author in _listed(authors)[:AUTHORS]:
        given = author.get("name") if isinstance(author, dict) else author
        if isinstance(given, str) and (name := plain(given, NAME)):
            yield name


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _count(value: Any) -> int:
    return min(value, MOST_UPVOTES) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _kind(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
