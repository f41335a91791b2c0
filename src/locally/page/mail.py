"""Mail through any SMTP server: who it is, what a message looks like, and how one is handed over.

The server is named by environment variables or by `mail.toml` in the data folder; see `Settings`.
"""

import os
import re
import smtplib
import ssl
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from locally.errors import UsageError
from locally.home import home
from locally.page import LOOPBACK

PORTS = {"starttls": 587, "tls": 465, "none": 25}
POLICY = SMTP.clone(cte_type="7bit")  # every relay takes it
LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


class MailError(UsageError):
    """The mail server cannot be used as it is configured."""


class Later(Exception):
    """Not now: the server asks to come back with this message, or, with `away`, does not talk to us at all."""

    def __init__(self, reply: str, *, away: bool = False) -> None:
        super().__init__(reply)
        self.away = away


class Refused(Exception):
    """Never: the server will not take this message, or, with `bounce`, mail for this address."""

    def __init__(self, reply: str, *, bounce: bool) -> None:
        super().__init__(reply)
        self.bounce = bounce


@dataclass(frozen=True)
class Settings:
    """How mail leaves this installation.

    Each stands in `mail.toml` under its name, or in the environment as LOCALLY_MAIL_ and its name, which counts more.

    Args:
        host: of the SMTP server.
        sender: address that mail comes from.
        url: where the page is reached from outside, for the links in mails; https:// unless on this machine.
        security: "starttls", "tls" (from the first byte on) or "none".
        port: 587, 465 or 25, by `security`.
        user: for servers that ask for a login.
        password: its password.
        password_file: file that holds it, instead.
        ca: file with the certificates of a private authority.
        timeout: seconds for each step of the conversation.
    """

    host: str
    sender: str
    url: str
    security: str = "starttls"
    port: int = 0
    user: str = ""
    password: str = field(default="", repr=False)
    password_file: str = ""
    ca: str = ""
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if self.security not in PORTS:
            raise MailError(f"mail: security must be one of {', '.join(PORTS)}, got {self.security!r}")
        if not 0 <= self.port < 65536:
            raise MailError(f"mail: port must be 1 to 65535, got {self.port}")
        if not 0 < self.timeout <= 120:
            raise MailError(f"mail: timeout must be above 0 and at most 120 seconds, got {self.timeout}")
        address(self.sender)
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
            raise MailError(f"mail: url must be the page's address, such as https://locally.example, got {self.url!r}")
        if self.user and self.security == "none" and self.host not in LOOPBACK:
            raise MailError("mail: security none would send the password in the clear; use starttls or tls")

    @property
    def base(self) -> str:
        """Address of the page with a slash at its end."""
        return self.url.rstrip("/") + "/"

    def secret(self) -> str:
        if not self.password_file:
            return self.password
        try:
            return Path(self.password_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise MailError(f"mail: cannot read password_file {self.password_file}: {error}") from None


def settings() -> Settings | None:
    """What the environment and `mail.toml` say; None where neither names a host: this installation sends no mail.

    Raises:
        MailError: something is missing or cannot be; the message names it and never shows the password.
    """
    said = _from_file(home() / "mail.toml") | _from_environment(os.environ)
    if not said.get("host"):
        return None
    if missing := [name for name in ("sender", "url") if not said.get(name)]:
        raise MailError(
            f"mail: {missing[0]} is missing: set LOCALLY_MAIL_{missing[0].upper()}, or name it in mail.toml"
        )
    for name, kind in (("port", int), ("timeout", float)):
        try:
            said[name] = kind(said.get(name, getattr(Settings, name)))
        except ValueError:
            raise MailError(f"mail: {name} must be a number, got {said[name]!r}") from None
    return Settings(**said)


def _from_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    known = {f.name for f in fields(Settings)}
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
        readable = os.name == "posix" and path.stat().st_mode & 0o077
    except (OSError, ValueError) as error:
        raise MailError(f"cannot read {path}: {error}") from None
    if readable and "password" in said:
        raise MailError(f"{path} holds a password that others can read: chmod 600 it, or use password_file")
    for name, value in said.items():
        if name not in known:
            raise MailError(f"{path}: there is no setting {name!r}; there are {', '.join(sorted(known))}")
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise MailError(f"{path}: {name} must be text or a number")
    return {name: value if name in ("port", "timeout") else str(value) for name, value in said.items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    names = {f.name: f"LOCALLY_MAIL_{f.name.upper()}" for f in fields(Settings)}
    return {name: environment[variable] for name, variable in names.items() if environment.get(variable)}


def address(text: str) -> str:
    """The address as mail carries it, its domain in lower case and ASCII; no name, no quotes, no comments.

    Raises:
        UsageError: it is none that we can send to.

    >>> address(" Ada.Lovelace@Example.ORG ")
    'Ada.Lovelace@example.org'
    """
    local, _, domain = text.strip().rpartition("@")
    with suppress(UnicodeError):
        domain = domain.encode("idna").decode("ascii").lower()
    labels = domain.split(".")
    if (
        not LOCAL.fullmatch(local)
        or len(local) > 64
        or len(local) + len(domain) > 253
        or len(labels) < 2
        or not all(LABEL.fullmatch(label) for label in labels)
    ):
        raise UsageError("that is not an e-mail address that we can send to")
    return f"{local}@{domain}"


def masked(address: str) -> str:
    """For eyes other than the owner's.

    >>> masked("ada@example.org")
    'a…@example.org'
    """
    local, _, domain = address.partition("@")
    return f"{local[:1]}…@{domain}"


def compose(
    sender: str,
    recipient: str,
    subject: str,
    text: str,
    html: str,
    *,
    message_id: str,
    when: datetime,
    unsubscribe: str = "",
) -> str:
    """A message in both forms, as it goes over the wire; `unsubscribe` is the address that ends it with one click.

    Raises:
        ValueError: a header would hold a line break.
    """
    message = EmailMessage(policy=POLICY)
    message["From"] = Address("Locally", addr_spec=sender)
    message["To"] = Address(addr_spec=recipient)
    message["Subject"] = subject
    message["Date"] = format_datetime(when)
    message["Message-ID"] = message_id
    message["Auto-Submitted"] = "auto-generated"
    if unsubscribe:
        message["List-Unsubscribe"] = f"<{unsubscribe}>"
        message["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"  # RFC 8058
    message.set_content(text)
    message.add_alternative(html, subtype="html")
    return message.as_bytes().decode("ascii")


class Session:
    """One conversation with the server; it begins when the first message needs it.

    Its methods raise `Later`, `Refused` or `MailError`; after one that broke off, the next message
    begins another.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._server: smtplib.SMTP | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            with suppress(smtplib.SMTPException, OSError):
                self._server.quit()
        self._drop()

    def offer(self, recipient: str) -> None:
        """Ask whether the server takes mail for this address."""
        with self._translated():
            if self._server is None:
                self._server = self._connected()
            code, reply = self._server.mail(self.settings.sender)
            if code != 250:
                if code < 500:
                    raise Later(_said(code, reply))
                raise MailError(f"the mail server refuses the sender {self.settings.sender} ({code})")
            code, reply = self._server.rcpt(recipient)
            if code not in (250, 251, 252):
                self._server.rset()
                if code < 500:
                    raise Later(_said(code, reply))
                raise Refused(_said(code, reply), bounce=True)

    def hand_over(self, content: str) -> str:
        """Send the message that was offered; the server's reply."""
        with self._translated():
            assert self._server is not None
            code, reply = self._server.data(content.encode("ascii"))
            if code == 250:
                return _said(code, reply)
            if code < 500:
                raise Later(_said(code, reply))
            raise Refused(_said(code, reply), bounce=False)

    def forget(self) -> None:
        """Take back the offer."""
        with self._translated():
            if self._server is not None:
                self._server.rset()

    def _connected(self) -> smtplib.SMTP:
        s = self.settings
        context = ssl.create_default_context(cafile=s.ca or None)
        port = s.port or PORTS[s.security]
        server = (
            smtplib.SMTP_SSL(s.host, port, timeout=s.timeout, context=context)
            if s.security == "tls"
            else smtplib.SMTP(s.host, port, timeout=s.timeout)
        )
        try:
            if s.security == "starttls":
                server.starttls(context=context)
            server.ehlo_or_helo_if_needed()
            if s.user:
                server.login(s.user, s.secret())
        except BaseException:
            server.close()
            raise
        return server

    def _drop(self) -> None:
        if self._server is not None:
            self._server.close()
        self._server = None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what smtplib and the network raise into our three words for it."""
        host = self.settings.host
        try:
            yield
        except smtplib.SMTPNotSupportedError as error:
            self._drop()
            raise MailError(f"the mail server {host} cannot do what is configured: {error}") from None
        except smtplib.SMTPResponseException as error:
            self._drop()
            if error.smtp_code < 500:
                raise Later(_said(error.smtp_code, error.smtp_error), away=True) from None
            if isinstance(error, smtplib.SMTPDataError):
                raise Refused(_said(error.smtp_code, error.smtp_error), bounce=False) from None
            raise MailError(f"the mail server {host} refuses us, or the login ({error.smtp_code})") from None
        except ssl.SSLCertVerificationError as error:
            self._drop()
            raise MailError(f"the certificate of {host} does not prove who it is: {error.verify_message}") from None
        except (smtplib.SMTPException, OSError) as error:
            self._drop()
            raise Later(f"{type(error).__name__}: {error}", away=True) from None


def _said(code: int, reply: bytes | str) -> str:
    text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else reply
    return f"{code} {' '.join(text.split())}"[:300]
