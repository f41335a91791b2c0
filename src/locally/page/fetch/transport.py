"""Fetches one address with patience and with limits: conditional requests, back-off, a bound on time and size."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from locally import __version__
from locally.errors import UsageError
from locally.page.preprints import Remembered, plain

BODY_LIMIT = 16 * 2**20  # bytes of an answer
CHUNK = 64 * 1024
CONNECT = 30.0  # seconds until the other side says something
WHOLE = 120.0  # seconds for an answer as a whole
ATTEMPTS = 5
PATIENCE = 120.0  # longest wait that a server may ask for, seconds
REASON = 200  # characters of what a server says went wrong
AGAIN = (408, 425, 429, 500, 502, 503, 504)


class FetchError(UsageError):
    """A source cannot be read; says which address and why."""


@dataclass(frozen=True)
class Answer:
    """What came: `body` is None where nothing has changed since the last time."""

    body: bytes | None
    page: Remembered


class _SafeRedirects(HTTPRedirectHandler):
    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        before, after = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if after not in ("http", "https") or (before, after) == ("https", "http"):
            raise FetchError(f"{req.full_url}: redirected to {after}, which is refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class Client:
    """Asks politely: one request at a time, `pause` seconds between two.

    Args:
        pause: least time between the starts of two requests, seconds; arXiv asks for three.
        back_off: first wait after a failure, seconds; doubles with each.
        sleep: waits; a test looks at what it is asked to.
    """

    def __init__(
        self, *, pause: float = 3.0, back_off: float = 2.0, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.pause, self.back_off, self._sleep = pause, back_off, sleep
        self._last = -float("inf")
        self._opener: OpenerDirector = build_opener(_SafeRedirects)

    def get(self, page: Remembered) -> Answer:
        """The body at `page.address`, if it changed since what `page` remembers.

        Raises:
            FetchError: the address cannot be read, its answer is too large or too slow, or it failed time after time.
        """
        address = page.address
        if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).netloc:
            raise FetchError(f"{address}: only http and https addresses are fetched")
        reason = ""
        for attempt in range(ATTEMPTS):
            self._wait(max(0.0, self._last + self.pause - time.monotonic()))
            self._last = time.monotonic()
            try:
                return self._once(page)
            except HTTPError as error:
                with error:
                    if error.code == 304:
                        return Answer(None, page)
                    reason = plain(f"{error.code} {error.reason}", REASON)
                    if error.code not in AGAIN:
                        break
                    asked = retry_after(error.headers.get("Retry-After", ""))
            except (URLError, OSError, HTTPException) as error:
                reason, asked = plain(str(getattr(error, "reason", error)), REASON) or type(error).__name__, None
            if asked is not None and asked > PATIENCE:
                raise FetchError(f"{address}: {reason}; it asks to come back in {asked:.0f} s")
            if attempt + 1 < ATTEMPTS:
                self._wait(asked if asked is not None else self.back_off * 2**attempt * random.uniform(0.75, 1.25))
        raise FetchError(f"{address}: {reason}")

    def _once(self, page: Remembered) -> Answer:
        headers = {"User-Agent": f"locally/{__version__}", "Accept-Encoding": "identity"}
        if page.etag:
            headers["If-None-Match"] = page.etag
        if page.modified:
            headers["If-Modified-Since"] = page.modified
        started = time.monotonic()
        with self._opener.open(Request(page.address, headers=headers), timeout=CONNECT) as response:
            body = _body(page.address, response, started)
            said = response.headers
            etag, modified = said.get("ETag", "")[:300], said.get("Last-Modified", "")[:100]
            return Answer(body, Remembered(page.address, etag, modified))

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self._sleep(seconds)


def _body(address: str, response: HTTPResponse, started: float) -> bytes:
    parts, size = [], 0
    while part := response.read(CHUNK):
        size += len(part)
        if size > BODY_LIMIT:
            raise FetchError(f"{address}: the answer is larger than {BODY_LIMIT // 2**20} MiB")
        if time.monotonic() - started > WHOLE:
            raise FetchError(f"{address}: the answer takes longer than {WHOLE:.0f} s")
        parts.append(part)
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and size < int(length):
        raise URLError("the answer broke off")
    return b"".join(parts)


def retry_after(text: str) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date; None where it says nothing.

    >>> retry_after("7"), retry_after("soon")
    (7.0, None)
    """
    if text.strip().isdigit():
        return float(text[:12])
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())
