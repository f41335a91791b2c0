"""A filter over tags, as it stands in an address: words joined by and (or a space), or, not (or a minus), brackets."""

import re
from collections.abc import Callable, Collection

from locally.errors import UsageError

Filter = Callable[[Collection[str]], bool]
LENGTH = 500  # characters
TOKEN = re.compile(r"\s*([()|&]|-(?=\S)|[^\s()|&]+)")


def tag_filter(text: str) -> Filter:
    """What a set of tags must satisfy; an empty text lets everything through.

    >>> wanted = tag_filter("optics or (lasers -old)")
    >>> [wanted(tags) for tags in ({"optics", "old"}, {"lasers"}, {"lasers", "old"})]
    [True, True, False]

    Raises:
        UsageError: the text is no such expression; says where it breaks.
    """
    if len(text) > LENGTH:
        raise UsageError(f"a filter of tags has {LENGTH} characters at most")
    words = TOKEN.findall(text.lower())
    if not words:
        return lambda _: True
    reader = _Reader(words)
    wanted = reader.either()
    if reader.left:
        raise UsageError(f"the filter of tags breaks at {reader.left[0]!r}")
    return wanted


class _Reader:
    """Recursive descent: either = both {or both}; both = one {[and] one}; one = not one | ( either ) | tag."""

    def __init__(self, words: list[str]) -> None:
        self.left = words

    def either(self) -> Filter:
        parts = [self.both()]
        while self.next_is("or", "|"):
            parts.append(self.both())
        return lambda tags: any(part(tags) for part in parts)

    def both(self) -> Filter:
        parts = [self.one()]
        while self.next_is("and", "&") or (self.left and self.left[0] not in ("or", "|", ")")):
            parts.append(self.one())
        return lambda tags: all(part(tags) for part in parts)

    def one(self) -> Filter:
        if self.next_is("not", "-"):
            inner = self.one()
            return lambda tags: not inner(tags)
        if self.next_is("("):
            inner = self.either()
            if not self.next_is(")"):
                raise UsageError("the filter of tags lacks a closing bracket")
            return inner
        if not self.left or self.left[0] in ("and", "&", "or", "|", ")"):
            found = repr(self.left[0]) if self.left else "its end"
            raise UsageError(f"the filter of tags lacks a tag before {found}")
        tag = self.left.pop(0)
        return lambda tags: tag in tags

    def next_is(self, *words: str) -> bool:
        if self.left and self.left[0] in words:
            self.left.pop(0)
            return True
        return False
