"""Reads the cards: every `<stem>.toml` in `locally/papers`, and in the folders that LOCALLY_PAPERS names.

An experiment is the file `<stem>.py` beside its card; it is imported only when it runs. Nothing heavy is imported
here, so that listing and searching papers is instant.
"""

import contextlib
import difflib
import importlib
import importlib.util
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from locally.errors import UsageError
from locally.evidence import Claim, Paper, Relation, Run, Scale, Work
from locally.home import home

BUILT_IN = Path(__file__).parent / "papers"

REQUIRED: dict[str, type] = {
    "number": int,
    "slug": str,
    "title": str,
    "authors": list,
    "published": date,
    "venue": str,
    "wing": str,
    "summary": str,
    "claims": list,
}
OPTIONAL: dict[str, type] = {"arxiv": str, "keywords": list, "objects": list, "example": str, "work": dict}
WORK_REQUIRED: dict[str, type | tuple[type, ...]] = {"time": list, "memory": list}
WORK_OPTIONAL: dict[str, type | tuple[type, ...]] = {"operations": list, "disk": (int, float)}
CLAIM_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "statement": str,
    "metric": str,
    "method": str,
    "relation": str,
    "value": (int, float, list),
    "source": str,
}
CLAIM_OPTIONAL: dict[str, type | tuple[type, ...]] = {"scale": str, "setting": dict}


class CardError(UsageError):
    def __init__(self, file: Path, key: str, reason: str) -> None:
        super().__init__(f"{file}: {key}: {reason}")


def folders() -> list[Path]:
    extra = os.environ.get("LOCALLY_PAPERS", "")
    return [BUILT_IN, *(Path(f) for f in extra.split(os.pathsep) if f)]


def load(where: Iterable[Path] | None = None) -> list[Paper]:
    """All papers by number.

    Raises:
        CardError: a card is malformed, or two share a slug or a number; says which file, key and why.
    """
    papers: list[Paper] = []
    parsed = ParsedCards()
    for folder in folders() if where is None else where:
        if not folder.is_dir():
            raise UsageError(f"LOCALLY_PAPERS names {folder}, which is not a folder")
        for file in sorted(folder.glob("*.toml")):
            paper = read_card(file, parsed)
            for other in papers:
                if other.slug == paper.slug or other.number == paper.number:
                    key = "slug" if other.slug == paper.slug else "number"
                    raise CardError(file, key, f"{getattr(paper, key)} belongs to {other.title!r} already")
            papers.append(paper)
    parsed.keep()
    return sorted(papers, key=lambda p: p.number)


class ParsedCards:
    """Cards as they were parsed before, by path, time and size.

    Cards seldom change and the standard library's TOML parser is slow: without this, listing the papers would take
    twice as long. What cannot be read or kept is parsed again.
    """

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError, TypeError, UsageError):
            self._file = home() / "cards.json"
            self._known = dict(json.loads(self._file.read_bytes()))

    def read(self, file: Path) -> dict[str, Any]:
        stat = file.stat()
        stamp = [stat.st_mtime_ns, stat.st_size]
        known = self._known.get(str(file))
        if known and known["stamp"] == stamp:
            return known["card"] | {"published": date.fromisoformat(known["card"]["published"])}
        card = tomllib.loads(file.read_text(encoding="utf-8"))
        if type(card.get("published")) is date:  # the one kind of value that a card has and JSON lacks
            self._known[str(file)] = {"stamp": stamp, "card": card}
            self._changed = True
        return card

    def keep(self) -> None:
        if not self._changed:
            return
        with contextlib.suppress(OSError, TypeError, AttributeError):
            draft = self._file.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(self._known, default=date.isoformat), encoding="utf-8")
            os.replace(draft, self._file)


def read_card(file: Path, parsed: ParsedCards | None = None) -> Paper:
    """One card; `CardError` names the file, the key and the reason."""
    try:
        card = (parsed or ParsedCards()).read(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CardError(file, "syntax", str(error)) from None
    _check_keys(file, card, REQUIRED, OPTIONAL, "")
    for key in ("authors", "keywords", "objects"):
        if not all(isinstance(item, str) and item for item in card.get(key, [])):
            raise CardError(file, key, "must be a list of non-empty strings")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", card["slug"]):
        raise CardError(file, "slug", f"must be lower-case words joined by hyphens, got {card['slug']!r}")
    if file.stem != card["slug"].replace("-", "_"):
        raise CardError(
            file, "slug", f"the file of {card['slug']!r} must be named {card['slug'].replace('-', '_')}.toml"
        )
    if not card["claims"]:
        raise CardError(file, "claims", "needs at least one claim")
    experiment = file.with_suffix(".py")
    return Paper(
        number=card["number"],
        slug=card["slug"],
        title=card["title"],
        authors=tuple(card["authors"]),
        published=card["published"].isoformat(),
        venue=card["venue"],
        wing=card["wing"],
        summary=" ".join(card["summary"].split()),
        claims=tuple(_claim(file, i, c) for i, c in enumerate(card["claims"], 1)),
        arxiv=card.get("arxiv", ""),
        keywords=tuple(card.get("keywords", ())),
        objects=tuple(card.get("objects", ())),
        example=card.get("example", "").strip(),
        experiment=experiment if experiment.exists() else None,
        work=_work(file, card["work"]) if "work" in card else None,
    )


def _work(file: Path, card: dict[str, Any]) -> Work:
    _check_keys(file, card, WORK_REQUIRED, WORK_OPTIONAL, "work.")
    for key, count, least in (("time", 3, "positive"), ("memory", 3, "positive"), ("operations", 2, "non-negative")):
        numbers = card.get(key, [0.0] * count)
        bound = 0 if key == "operations" else 1e-9
        sound = len(numbers) == count and all(type(n) in (int, float) and bound <= n < math.inf for n in numbers)
        if not sound:
            raise CardError(file, f"work.{key}", f"must be {count} {least} numbers, got {numbers!r}")
    for key in ("time", "memory"):
        if card[key][1] != 1:
            raise CardError(file, f"work.{key}", f"must be 1 at default scale, got {card[key][1]!r}")
    if not 0 <= card.get("disk", 0) < math.inf:
        raise CardError(file, "work.disk", f"must be GiB, non-negative, got {card['disk']!r}")
    time, memory = (dict(zip(Scale, card[key])) for key in ("time", "memory"))
    once, each = card.get("operations", (0.0, 0.0))
    return Work(time, memory, (float(once), float(each)), float(card.get("disk", 0.0)))


def _claim(file: Path, number: int, card: Any) -> Claim:
    where = f"claims[{number}]"
    if not isinstance(card, dict):
        raise CardError(file, where, "must be a table")
    _check_keys(file, card, CLAIM_REQUIRED, CLAIM_OPTIONAL, f"{where}.")
    for key, kind in (("relation", Relation), ("scale", Scale)):
        if key in card and card[key] not in list(kind):
            allowed = ", ".join(kind)
            raise CardError(file, f"{where}.{key}", f"must be one of {allowed}, got {card[key]!r}")
    value = card["value"]
    if isinstance(value, list) and not (len(value) == 2 and all(isinstance(v, int | float) for v in value)):
        raise CardError(file, f"{where}.value", f"must be a number or [low, high], got {value!r}")
    try:
        return Claim.from_dict(card)
    except ValueError as error:
        raise CardError(file, f"{where}.value", str(error)) from None


def _check_keys(file: Path, card: dict[str, Any], required: Any, optional: Any, prefix: str) -> None:
    kinds = required | optional
    for key in required:
        if key not in card:
            raise CardError(file, prefix + key, "is missing")
    for key, value in card.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, 1)
            raise CardError(file, prefix + key, "is no key of a card" + (f"; {near[0]}?" if near else ""))
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            kind = kinds[key] if isinstance(kinds[key], type) else kinds[key][0]
            raise CardError(file, prefix + key, f"must be of type {kind.__name__}, got {value!r}")
        if isinstance(value, str) and not value.strip():
            raise CardError(file, prefix + key, "is empty")


def find(papers: Sequence[Paper], name: str) -> Paper:
    """By slug, number, arXiv id, or unique prefix of the slug.

    Raises:
        UsageError: nothing or several match; says what was near.
    """
    wanted = name.strip().lower()
    identifier = re.sub(r"^(arxiv:)|v\d+$", "", wanted)
    for paper in papers:
        if wanted == paper.slug or (wanted.isdigit() and int(wanted) == paper.number) or identifier == paper.arxiv:
            return paper
    starting = [p for p in papers if wanted and p.slug.startswith(wanted)]
    if len(starting) == 1:
        return starting[0]
    if starting:
        raise UsageError(f"{name!r} is the start of several papers: {', '.join(p.slug for p in starting)}")
    raise UsageError(f"no paper {name!r}; nearest: {', '.join(_nearest(papers, wanted))}")


def _nearest(papers: Sequence[Paper], name: str) -> list[str]:
    def likeness(paper: Paper) -> float:
        whole = difflib.SequenceMatcher(None, name, paper.slug).ratio()
        words = [difflib.SequenceMatcher(None, name, w).ratio() for w in _words(f"{paper.slug} {paper.title}")]
        return max([whole, *(0.9 * w for w in words)])

    return [p.slug for p in sorted(papers, key=likeness, reverse=True)[:3]]


def search(papers: Sequence[Paper], query: str) -> list[Paper]:
    """Papers in which every word of the query starts some word, best first; a misspelt word matches its nearest."""
    fields = [
        {
            word: weight
            for text, weight in (
                (" ".join(c.statement for c in p.claims), 1),
                (p.summary, 1),
                (" ".join((*p.authors, p.venue, p.wing, p.arxiv)), 2),
                (" ".join(p.keywords), 3),
                (f"{p.slug} {p.title}", 4),
            )
            for word in _words(text)
        }
        for p in papers
    ]
    vocabulary = sorted({word for words in fields for word in words})
    scores = [0.0] * len(papers)
    for word in _words(query):
        wanted: tuple[str, ...] = (word,)
        if not any(v.startswith(word) for v in vocabulary):
            wanted = tuple(difflib.get_close_matches(word, vocabulary, 3, cutoff=0.75)) or wanted
        for i, words in enumerate(fields):
            hit = max((weight for w, weight in words.items() if w.startswith(wanted)), default=0)
            scores[i] = scores[i] + hit if hit and scores[i] >= 0 else -1.0
    ranked = sorted((i for i in range(len(papers)) if scores[i] > 0), key=lambda i: -scores[i])
    return [papers[i] for i in ranked]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def experiment(paper: Paper) -> Callable[[Run], None]:
    """Import the paper's experiment, with whatever it needs.

    Raises:
        UsageError: the paper has no experiment, or its file defines none.
    """
    if paper.experiment is None:
        raise UsageError(f"{paper.slug} is not yet runnable: its method has no experiment")
    if paper.experiment.parent == BUILT_IN:
        module = importlib.import_module(f"locally.papers.{paper.stem}")
    else:
        spec = importlib.util.spec_from_file_location(f"locally_papers_{paper.stem}", paper.experiment)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if not callable(getattr(module, "experiment", None)):
        raise UsageError(f"{paper.experiment} defines no function experiment(run)")
    return module.experiment
