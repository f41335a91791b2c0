"""arXiv's query interface: addresses to ask for, and the Atom feed that it answers with."""

from collections.abc import Iterator, Sequence
from datetime import date
from urllib.parse import urlencode
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from locally.page.fetch.parsed import Malformed, Parsed
from locally.page.preprints import (
    ARXIV,
    AUTHORS,
    LABELS,
    NAME,
    REMARK,
    SUMMARY,
    TITLE,
    Preprint,
    identify,
    instant,
    plain,
)

BASE = "https://export.arxiv.org/api/query"
PAGE = 200  # entries asked for at once
DEPTH = 30  # of nested elements

ATOM = "{http://www.w3.org/2005/Atom}"
OPEN_SEARCH = "{http://a9.com/-/spec/opensearch/1.1/}"
EXTENSION = "{http://arxiv.org/schemas/atom}"


def addresses(base: str, first: date, last: date, categories: Sequence[str], limit: int) -> Iterator[str]:
    """Pages of what was submitted from `first` to `last`, newest first, `limit` entries at most."""
    wanted = " OR ".join(f"cat:{c}" for c in categories)
    query = f"({wanted}) AND submittedDate:[{first:%Y%m%d}0000 TO {last:%Y%m%d}2359]"
    for start in range(0, limit, PAGE):
        fields = {
            "search_query": query,
            "start": start,
            "max_results": min(PAGE, limit - start),
            "sortBy": "submittedDate",
            "sortOrder": "descending",
        }
        yield f"{base}?{urlencode(fields)}"


def parse(body: bytes) -> Parsed:
    """Entries of one page; those that cannot be kept are told in `refused`.

    Raises:
        Malformed: this is no feed of arXiv's, or it brings a document type or entities of its own.
    """
    feed = _tree(body)
    if feed.tag != f"{ATOM}feed":
        raise Malformed(f"expected an Atom feed, got <{feed.tag[:80]}>")
    entries = feed.findall(f"{ATOM}entry")
    if len(entries) == 1 and "/api/errors" in _text(entries[0], f"{ATOM}id"):
        raise Malformed(f"arXiv says: {plain(_text(entries[0], f'{ATOM}summary'), 200)}")
    total = _text(feed, f"{OPEN_SEARCH}totalResults").strip()
    parsed = Parsed(len(entries), total=int(total[:9]) if total.isdecimal() else None)
    for entry in entries:
        try:
            parsed.found.append(_preprint(entry))
        except ValueError as problem:
            parsed.refused.append(str(problem))
    return parsed


def _preprint(entry: Element) -> Preprint:
    address = _text(entry, f"{ATOM}id")
    known = identify(address)
    if known is None:
        raise ValueError(f"no arXiv id: {plain(address, 80)!r}")
    key, version = known
    title, summary = plain(_text(entry, f"{ATOM}title"), TITLE), plain(_text(entry, f"{ATOM}summary"), SUMMARY)
    if not title:
        raise ValueError(f"{key} has no title")
    published = instant(_text(entry, f"{ATOM}published"))
    names = (plain(_text(author, f"{ATOM}name"), NAME) for author in entry.findall(f"{ATOM}author")[:AUTHORS])
    primary = [e.get("term", "") for e in entry.findall(f"{EXTENSION}primary_category")]
    terms = [*primary, *(e.get("term", "") for e in entry.findall(f"{ATOM}category"))]
    return Preprint(
        key=key,
        version=version,
        title=title,
        authors=tuple(name for name in names if name),
        summary=summary,
        categories=tuple(dict.fromkeys(term for t in terms if (term := plain(t, 40))))[:LABELS],
        remark=plain(_text(entry, f"{EXTENSION}comment"), REMARK),
        organisation=plain(_text(entry, f"{ATOM}author/{EXTENSION}affiliation"), NAME),
        published=published,
        updated=instant(_text(entry, f"{ATOM}updated") or published),
        day=published[:10],
        sources=(ARXIV,),
    )


def _text(element: Element, path: str) -> str:
    found = element.find(path)
    return "" if found is None else "".join(found.itertext())


def _tree(body: bytes) -> Element:
    """The document's elements. A document type is refused as soon as it begins, before any entity is declared."""
    builder = TreeBuilder()
    parser = expat.ParserCreate(namespace_separator="}")
    depth = 0

    def name(raw: str) -> str:
        return "{" + raw if "}" in raw else raw

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEPTH:
            raise Malformed("elements are nested too deeply")
        builder.start(name(tag), {name(k): v for k, v in attributes.items()})

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name(tag))

    def document_type(*_: object) -> None:
        raise Malformed("a document type or entities of its own are refused")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = document_type
    try:
        parser.Parse(body, True)
        return builder.close()
    except (expat.ExpatError, ValueError, LookupError, AssertionError) as problem:
        if isinstance(problem, Malformed):
            raise
        raise Malformed(f"not XML: {problem}") from None
