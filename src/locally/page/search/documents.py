"""What search knows of a paper: one text for each thing that a reader may remember of it."""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property

from locally.evidence import Paper
from locally.page.preprints import Preprint

COLUMNS = ("title", "keywords", "people", "summary", "claims")


@dataclass(frozen=True)
class Document:
    """`key` names the paper; `card` tells those of the catalogue from those fetched."""

    key: str
    title: str
    keywords: str
    people: str
    summary: str
    claims: str
    card: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return self.title, self.keywords, self.people, self.summary, self.claims

    @property
    def text(self) -> str:
        return " ".join(self.columns)

    @cached_property
    def stamp(self) -> str:
        """Changes whenever the text does."""
        return hashlib.blake2b("\x00".join(self.columns).encode(), digest_size=12).hexdigest()


def of_card(paper: Paper) -> Document:
    return Document(
        key=paper.slug,
        title=f"{paper.title} {paper.slug.replace('-', ' ')}",
        keywords=" ".join(paper.keywords),
        people=" ".join((*paper.authors, paper.venue, paper.wing, paper.arxiv)),
        summary=paper.summary,
        claims=" ".join(claim.statement for claim in paper.claims),
        card=True,
    )


def of_preprint(preprint: Preprint) -> Document:
    return Document(
        key=preprint.key,
        title=preprint.title,
        keywords=" ".join((*preprint.keywords, *preprint.categories)),
        people=" ".join((*preprint.authors, preprint.organisation, preprint.arxiv)),
        summary=preprint.summary,
        claims=preprint.remark,
    )


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
