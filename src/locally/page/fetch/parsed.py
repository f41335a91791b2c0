"""What a parser makes of one page of results."""

from dataclasses import dataclass, field

from locally.page.preprints import Preprint


class Malformed(ValueError):
    """A page that is not what its source promises; nothing of it is kept."""


@dataclass
class Parsed:
    """`entries` counts what stood on the page, `total` all that the source has where it tells."""

    entries: int
    found: list[Preprint] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    total: int | None = None
