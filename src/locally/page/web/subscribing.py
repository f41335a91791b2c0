"""Subscribing an address, confirming it and, with one click, leaving it alone again.

A link to confirm or to end carries its own proof, so it works without the page's token, and from a mail program that
knows nothing of our forms (RFC 8058). Opening one changes nothing, since mail scanners open every link: it shows a
button, and that does.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from locally.errors import UsageError
from locally.page.limits import Allowance, retry_after
from locally.page.links import BadLink
from locally.page.mail import Settings, address
from locally.page.outbox import Postman
from locally.page.shelf import Shelf
from locally.page.store import Store
from locally.page.subscriptions import CONFIRM, END, Period, Subscriptions
from locally.page.web.answers import Answers, enough, fields, wants_json

T = TypeVar("T")
# below these an address is its own proof, or shows nothing that is a secret
OPEN = (f"/subscriptions/{CONFIRM}/", f"/subscriptions/{END}/", "/static/")
FROM_ONE = (10, 3600.0)  # asked from one place, in seconds
FOR_ONE = (3, 86400.0)  # asked for one address
ON_ITS_WAY = "If this address can be subscribed, a mail with a link to confirm is on its way."


class Subscribing:
    """
    Args:
        settings: of the mail server; None where there is none, and feeds are all that is offered.
    """

    def __init__(self, store: Store, settings: Settings | None, shelf: Shelf, answers: Answers) -> None:
        self.shelf, self.answers = shelf, answers
        self.subscriptions = None if settings is None else Subscriptions(store, settings)
        self.postman = None if settings is None else Postman(store, settings)
        self.from_one, self.for_one = Allowance(*FROM_ONE), Allowance(*FOR_ONE)

    def router(self) -> APIRouter:
        """The routes; the postman works while they are served."""
        routes = APIRouter(lifespan=self._serving)
        routes.get("/subscribe")(self.form)
        routes.post("/subscriptions")(self.ask)
        routes.get(f"/subscriptions/{CONFIRM}/{{period}}/{{link}}")(self.asked)
        routes.post(f"/subscriptions/{CONFIRM}/{{period}}/{{link}}")(self.confirm)
        routes.get(f"/subscriptions/{END}/{{link}}")(self.ending)
        routes.post(f"/subscriptions/{END}/{{link}}")(self.end)
        return routes

    @asynccontextmanager
    async def _serving(self, _: FastAPI) -> AsyncIterator[None]:
        if self.postman is None:
            yield
            return
        self.postman.start()
        yield
        await asyncio.to_thread(self.postman.close)

    def form(self, request: Request) -> Response:
        return self.answers.html(
            request, "subscribe.html", wings=self._wings(), mail=self.subscriptions is not None, periods=list(Period)
        )

    async def ask(self, request: Request) -> Response:
        subscriptions, said = self._open(), await fields(request)
        try:
            to = address(said.get("address", ""))
        except UsageError as error:
            raise HTTPException(422, str(error)) from None
        period, wing = said.get("period", Period.DAILY), said.get("wing", "")
        if period not in list(Period):
            raise HTTPException(422, f"period must be one of {', '.join(Period)}")
        if wing and wing not in self._wings():
            raise HTTPException(422, "there is no such wing")
        enough(self.from_one, request)
        if wait := self.for_one.take(to.lower()):
            raise HTTPException(429, "that is enough for one address: try again later", headers=retry_after(wait))
        await asyncio.to_thread(subscriptions.ask, to, Period(period), wing)
        assert self.postman is not None
        self.postman.ring()
        return self._said(request, "Look into your mailbox", ON_ITS_WAY, status=202)

    def asked(self, request: Request, period: str, link: str) -> Response:
        found = self._good(lambda s: s.asked(_period(period), link))
        about = f"papers on {found.wing}" if found.wing else "all papers"
        text = f"The {period} digest of {about}, by e-mail."
        return self._said(request, "Confirm your subscription", text, button="Subscribe")

    def confirm(self, request: Request, period: str, link: str) -> Response:
        self._good(lambda s: s.confirm(_period(period), link))
        text = f"The {period} digest comes by e-mail from now on. Each one has a link that ends it."
        return self._said(request, "Subscribed", text)

    def ending(self, request: Request, link: str) -> Response:
        if self._good(lambda s: s.ending(link)) is None:
            return self._ended(request)
        return self._said(request, "Unsubscribe", "No more digests to this address.", button="Unsubscribe")

    def end(self, request: Request, link: str) -> Response:
        self._good(lambda s: s.end(link))
        return self._ended(request)

    def _ended(self, request: Request) -> Response:
        return self._said(request, "Unsubscribed", "This subscription has ended, and its address is forgotten here.")

    def _open(self) -> Subscriptions:
        if self.subscriptions is None:
            raise HTTPException(404, "this installation sends no mail")
        return self.subscriptions

    def _good(self, use: Callable[[Subscriptions], T]) -> T:
        try:
            return use(self._open())
        except BadLink as error:
            raise HTTPException(404, str(error)) from None

    def _said(self, request: Request, title: str, text: str, *, status: int = 200, button: str = "") -> Response:
        if wants_json(request):
            return JSONResponse({"status": text}, status_code=status)
        response = self.answers.html(request, "subscription.html", heading=title, text=text, button=button)
        response.status_code = status
        return response

    def _wings(self) -> list[str]:
        return sorted({paper.wing for paper in self.shelf.papers().values()})


def _period(text: str) -> Period:
    if text not in list(Period):
        raise BadLink("this link is not one of ours")
    return Period(text)
