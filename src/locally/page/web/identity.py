"""Who reads: by the header of a reverse proxy where the operator names one, otherwise by a signed cookie.

A reader becomes a person with the first thing that is kept for them, not by looking.
"""

import secrets
import time

from fastapi import HTTPException, Request, Response

from locally.page.links import DAY, BadLink, signer
from locally.page.people import People, Person
from locally.page.preprints import plain
from locally.page.store import Store

COOKIE, PURPOSE = "locally-person", "person"
LASTS = 5 * 365 * DAY  # seconds
USER = 150  # characters of a user's name that the proxy gives


class Identity:
    """
    Args:
        user_header: header in which a reverse proxy tells the user; "" for none. Whoever reaches the page past that
            proxy could put any name there.
    """

    def __init__(self, store: Store, user_header: str = "") -> None:
        self.people, self.user_header = People(store), user_header
        self._signer = signer(store, "people")

    def user(self, request: Request) -> str:
        """The name that the proxy gives; too long a one is none, since two of them could look alike when cut."""
        name = request.headers.get(self.user_header, "") if self.user_header else ""
        return plain(name, USER) if len(name) <= USER else ""

    def of(self, request: Request) -> Person | None:
        if self.user_header:
            user = self.user(request)
            return self.people.known(key=f"user:{user}") if user else None
        try:
            number, _ = self._signer.read(PURPOSE, request.cookies.get(COOKIE, ""))
        except (BadLink, ValueError):
            return None
        return self.people.known(number=number)

    def settle(self, request: Request) -> Person:
        """The person who asks for something to be kept, met now if not before."""
        person = self.of(request)
        if person is not None:
            return person
        if self.user_header:
            user = self.user(request)
            if not user:
                raise HTTPException(401, f"the reverse proxy names no user in {self.user_header}")
            return self.people.welcome(f"user:{user}", user)
        return self.people.welcome(f"cookie:{secrets.token_urlsafe(16)}")

    def remember(self, request: Request, response: Response, person: Person) -> None:
        """Give a browser the cookie by which this person is known again."""
        if self.user_header:
            return
        until = time.time() + LASTS
        value = self._signer.sign(PURPOSE, person.id, secrets.token_hex(4), until=until)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, value, max_age=int(LASTS), httponly=True, samesite="lax", secure=secure)
