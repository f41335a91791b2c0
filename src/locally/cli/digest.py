"""`locally digest`: write what is due to those who subscribed."""

from typing import TYPE_CHECKING, Annotated

import typer

from locally import catalogue
from locally.errors import UsageError

if TYPE_CHECKING:
    from locally.page.mail import Settings


def digest(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what is due and send nothing.")] = False,
    send: Annotated[bool, typer.Option("--send", help="Send what is due, and what waits in the outbox.")] = False,
) -> None:
    """Send the daily and weekly digests that are due; run it once a day or more often, nobody gets one twice."""
    if dry_run == send:
        raise UsageError("give either --dry-run or --send")
    from locally.page.digest import Digests
    from locally.page.mail import masked
    from locally.page.outbox import Outbox
    from locally.page.store import Store

    settings, store = mail_settings(), Store()
    digests = Digests(store, settings, catalogue.load())
    if dry_run:
        due = [(s, d) for s in digests.due() if (d := digests.write(s)) is not None]
        for subscription, written in due:
            print(f"To: {masked(subscription.address)}\nSubject: {written.subject}\n\n{written.text}\n")
        print(f"{len(due)} due")
        return
    digests.queue()
    done = Outbox(store, settings).deliver()
    print(", ".join(f"{count} {state}" for state, count in sorted(done.items())) or "nothing to send")


def mail_settings() -> "Settings":
    from locally.page.mail import settings

    found = settings()
    if found is None:
        raise UsageError("no mail server is configured: set LOCALLY_MAIL_HOST, or name it in mail.toml")
    return found
