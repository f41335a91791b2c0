"""What the tests of mail share: a mail server to talk to, and its letters."""

import email
import email.policy
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path

import trustme

from locally.page.mail import Settings

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Letter:
    """A message as the server got it."""

    recipient: str
    secure: str  # "TLS" or "clear"
    login: str
    message: EmailMessage

    @property
    def text(self) -> str:
        return self.message.get_body(("plain",)).get_content()

    @property
    def html(self) -> str:
        return self.message.get_body(("html",)).get_content()

    def link(self, purpose: str) -> str:
        """The path of the one link for this."""
        (found,) = set(re.findall(rf"https?://[^/\s]+(/subscriptions/{purpose}/\S+)", self.text))
        return found


class MailServer:
    """tests/page/smtp_server.py as a process; a context manager."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options, self.port = folder, options, 0
        folder.mkdir(exist_ok=True)

    def __enter__(self) -> "MailServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        (self.folder / "port").unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.page.smtp_server", str(self.folder), *self.options]
        command += ["--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        wait_for(lambda: (self.folder / "port").exists())
        self.port = int((self.folder / "port").read_text())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def letters(self) -> list[Letter]:
        found = []
        for path in sorted(self.folder.glob("*.eml"), key=lambda p: int(p.stem)):
            head, _, content = path.read_bytes().partition(b"\n")
            recipient, secure, login = head.decode().split(" ")
            message = email.message_from_bytes(content, policy=email.policy.default)
            assert isinstance(message, EmailMessage)
            found.append(Letter(recipient, secure, login, message))
        return found

    def settings(self, **other: object) -> Settings:
        said = {"host": "127.0.0.1", "port": self.port, "security": "none", "sender": "page@locally.example"}
        return Settings(**(said | {"url": "https://locally.example/", "timeout": 10.0} | other))  # type: ignore[arg-type]

    def environment(self, **other: str) -> dict[str, str]:
        """For a process that is to send through this server."""
        said = {"host": "127.0.0.1", "port": str(self.port), "security": "none", "sender": "page@locally.example"}
        said |= {"url": "https://locally.example/"} | other
        return dict(os.environ) | {f"LOCALLY_MAIL_{name.upper()}": value for name, value in said.items()}


def certificate(folder: Path, name: str) -> tuple[str, str]:
    """A certificate with its key for this host, and the authority that vouches for it: two files."""
    authority = trustme.CA()
    own, ca = folder / f"{name}.pem", folder / f"{name}-ca.pem"
    authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(own)
    authority.cert_pem.write_to_path(ca)
    return str(own), str(ca)


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
