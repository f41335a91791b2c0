"""Links that prove by themselves that we made them: signed, for one purpose, until a day."""

import base64
import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from locally.errors import UsageError
from locally.page.schema import secrets as kept
from locally.page.store import Store

HOUR, DAY = 3600.0, 86400.0


class BadLink(UsageError):
    """The link is not one of ours, is for something else, or is too old."""


@dataclass(frozen=True)
class Signer:
    """Makes and reads links with one secret.

    >>> signer = Signer(b"of thirty-two bytes or so, random")
    >>> link = signer.sign("confirm", 7, "n0nce", until=2e9)
    >>> signer.read("confirm", link, now=1e9)
    (7, 'n0nce')
    >>> signer.read("end", link, now=1e9)
    Traceback (most recent call last):
    ...
    locally.page.links.BadLink: this link is not one of ours
    """

    secret: bytes

    def sign(self, purpose: str, number: int, nonce: str, *, until: float) -> str:
        """A name that may stand in an address: of row `number` in its state `nonce`, good until `until` (Unix time)."""
        said = f"{number}.{int(until)}.{nonce}"
        return f"{said}.{self._mac(purpose, said)}"

    def read(self, purpose: str, link: str, *, now: float | None = None) -> tuple[int, str]:
        """Row and nonce that the link was made for.

        Raises:
            BadLink: it was not signed by us for this purpose, or its time is over.
        """
        said, _, mac = link.rpartition(".")
        if not hmac.compare_digest(mac.encode(), self._mac(purpose, said).encode()):
            raise BadLink("this link is not one of ours")
        number, until, nonce = said.split(".")
        if (time.time() if now is None else now) > int(until):
            raise BadLink("this link is too old")
        return int(number), nonce

    def _mac(self, purpose: str, said: str) -> str:
        digest = hmac.digest(self.secret, f"{purpose}\n{said}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def signer(store: Store, name: str = "links") -> Signer:
    """With the secret that all who use this store share; it is drawn when it is first needed."""
    wanted = sa.select(kept.c.value).where(kept.c.name == name)
    rows = store.query(wanted)
    if not rows:
        try:
            with store.writing() as connection:
                connection.execute(kept.insert().values(name=name, value=secrets.token_hex(32)))
        except IntegrityError:
            pass  # another was faster
        rows = store.query(wanted)
    return Signer(bytes.fromhex(rows[0][0]))
