"""`locally subscribe`: ask a mailbox whether it wants the digest."""

from typing import Annotated

import typer

from locally import catalogue
from locally.errors import UsageError


def subscribe(
    address: Annotated[str, typer.Argument(help="E-mail address; it gets a link to confirm.")],
    wing: Annotated[str, typer.Option(help="Only papers of this wing.")] = "",
    weekly: Annotated[bool, typer.Option("--weekly", help="Once a week instead of once a day.")] = False,
) -> None:
    """Subscribe an address to the digest; it must confirm by the link in a mail."""
    wings = sorted({paper.wing for paper in catalogue.load()})
    if wing and wing not in wings:
        raise UsageError(f"--wing must be one of {', '.join(wings)}, got {wing!r}")
    from locally.cli.digest import mail_settings
    from locally.page.outbox import Letter, Outbox
    from locally.page.store import Store
    from locally.page.subscriptions import Period, Subscriptions

    settings, store = mail_settings(), Store()
    period = Period.WEEKLY if weekly else Period.DAILY
    Subscriptions(store, settings).ask(address, period, wing, anew=True)
    done = Outbox(store, settings).deliver()
    if done[Letter.WAITING]:
        print("The mail server is not there for us now; `locally digest --send` or `locally serve` tries again.")
    elif done[Letter.BOUNCED] or done[Letter.REFUSED]:
        raise UsageError("the mail server does not take mail for this address")
    else:
        print("A mail with a link to confirm is on its way.")
