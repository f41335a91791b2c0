"""A mail server for the tests, in a process of its own: `python -m tests.page.smtp_server FOLDER [OPTION ...]`.

It keeps what it accepts in FOLDER, one file a message whose first line names the recipient, and writes its port to
FOLDER/port. What it does to a recipient stands in the part before the @:

    unknown      is rejected for ever
    greylisted   is asked to come back, the first time
    spam         is rejected once the message has been read
    dying        makes the server die in the middle of the message, the first time
    stuck-early  never hears whether it is accepted, the first time
    stuck-late   never hears whether its message was, though it was

Options: `--certificate FILE` offers STARTTLS with it, `--tls` speaks TLS from the first byte on, `--user NAME
--password WORD` asks for a login.
"""

import argparse
import asyncio
import os
import ssl
import time
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword


class Handler:
    def __init__(self, folder: Path, tls: bool) -> None:
        self.folder, self.tls = folder, tls

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        name = address.partition("@")[0]
        asked = self.folder / f"asked-{name}"
        first = not asked.exists()
        asked.touch()
        if name == "unknown":
            return "550 5.1.1 no such user"
        if name == "greylisted" and first:
            return "451 4.7.1 come back later"
        if name == "stuck-early" and first:
            await asyncio.sleep(3600)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        (recipient,) = envelope.rcpt_tos
        name = recipient.partition("@")[0]
        if name == "dying" and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os._exit(1)
        if name == "spam":
            return "554 5.7.1 we do not like it"
        draft = self.folder / "draft"
        login = session.auth_data.login.decode() if session.auth_data else ""
        secure = "TLS" if self.tls or session.ssl else "clear"
        draft.write_bytes(f"{recipient} {secure} {login}\n".encode() + envelope.content)
        draft.rename(self.folder / f"{time.monotonic_ns()}.eml")
        if name == "stuck-late":
            await asyncio.sleep(3600)
        return "250 OK"


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--certificate")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--user")
    parser.add_argument("--password")
    asked = parser.parse_args()
    context = None
    options: dict[str, Any] = {}
    if asked.certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(asked.certificate)
        if not asked.tls:
            options |= {"tls_context": context, "require_starttls": True}
    if asked.user:
        login = (asked.user.encode(), asked.password.encode())

        def authenticate(_s: Any, _session: Any, _envelope: Any, _mechanism: str, data: LoginPassword) -> AuthResult:
            return AuthResult(success=(data.login, data.password) == login, handled=False, auth_data=data)

        options |= {"authenticator": authenticate, "auth_required": True, "auth_require_tls": not asked.tls}
    handler = Handler(asked.folder, asked.tls)
    server = await asyncio.get_running_loop().create_server(
        lambda: SMTP(handler, hostname="localhost", **options),
        host="127.0.0.1",
        port=asked.port,
        ssl=context if asked.tls else None,
    )
    draft = asked.folder / "port.draft"
    draft.write_text(str(server.sockets[0].getsockname()[1]))
    draft.rename(asked.folder / "port")
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
