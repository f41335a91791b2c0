"""The application as a whole: its rooms, who is let in, and the server that it runs in."""

import asyncio
import gc
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import cache
from importlib import resources
from urllib.parse import urlencode, urlsplit

import uvicorn
from anyio import to_thread
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware
from threadpoolctl import threadpool_limits

from locally.errors import UsageError
from locally.page import LOOPBACK
from locally.page.feed import entity_tag
from locally.page.limits import BodyLimit
from locally.page.mail import settings
from locally.page.queue import Queue
from locally.page.report import style_sheet
from locally.page.shelf import Shelf
from locally.page.store import Store
from locally.page.trending import Trending
from locally.page.web.answers import BODY_LIMIT, Answers
from locally.page.web.feed import Feed
from locally.page.web.guard import Guard
from locally.page.web.identity import Identity
from locally.page.web.lines import Lines
from locally.page.web.reading import Reading
from locally.page.web.running import Running
from locally.page.web.subscribing import Subscribing
from locally.page.web.taking_part import TakingPart

AT_ONCE = 4  # pages in the making: they want the one interpreter, so that more would only make all of them late
SWITCH = 0.001  # seconds for which one of them may keep it from the others


def create_app(
    store: Store,
    *,
    at_once: int = 1,
    data: str = "",
    token: str | None = None,
    hosts: tuple[str, ...] = LOOPBACK,
    user_header: str = "",
) -> FastAPI:
    """The application; its queue starts and stops with it.

    Args:
        store: where evidence, fetched papers and what people keep are.
        at_once: experiments side by side.
        data: folder with the user's data sets, "" for none.
        token: who does not know it sees nothing; None for a page that only this machine can reach.
        hosts: names under which the page may be called.
        user_header: header in which a reverse proxy names the user, "" for none; who brings none sees nothing.
    """
    shelf = Shelf(store)
    queue = Queue(store, shelf.papers, at_once=at_once, data=data)
    trending = Trending(store)
    identity = Identity(store, user_header)
    answers, lines = Answers(identity), Lines(store, shelf)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = AT_ONCE
        queue.start()
        yield
        await asyncio.to_thread(queue.close)
        await asyncio.to_thread(trending.flush)

    def warm() -> None:
        cards = shelf.warm()
        lines.markup(lines.of(list(cards), cards))
        trending.scores()

    app = FastAPI(lifespan=lifespan, title="Locally", openapi_url=None, docs_url=None, redoc_url=None)
    mail = settings()
    if mail is not None:
        hosts = (*hosts, urlsplit(mail.url).hostname or "")  # where the links in mails lead
    app.state.warm = warm
    app.add_middleware(BodyLimit, limit=BODY_LIMIT)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*(h.strip("[]") for h in hosts), *hosts])
    app.add_middleware(Guard, token=token, identity=identity)
    app.get("/", response_class=HTMLResponse)(Feed(shelf, queue, lines, trending, answers).feed)
    app.include_router(Reading(store, shelf, queue, lines, trending, answers).router())
    app.include_router(Running(shelf, queue).router())
    app.include_router(TakingPart(store, shelf, answers).router())
    app.include_router(Subscribing(store, mail, shelf, answers).router())
    app.get("/static/{name}")(_static)
    for kind in (HTTPException, RequestValidationError, 404, 405):
        app.exception_handler(kind)(answers.problem)
    return app


def serve(
    store: Store,
    *,
    host: str,
    port: int,
    at_once: int,
    data: str,
    token: str | None,
    opened: Callable[[str], None],
    user_header: str = "",
) -> None:
    """Serve until interrupted; `opened` is called with the page's address once it answers."""
    hosts = LOOPBACK if host in LOOPBACK and not user_header else ("*",)
    app = create_app(store, at_once=at_once, data=data, token=token, hosts=hosts, user_header=user_header)
    server = uvicorn.Server(
        uvicorn.Config(app, host=host.strip("[]"), port=port, log_level="warning", timeout_graceful_shutdown=3)
    )

    sys.setswitchinterval(SWITCH)
    threadpool_limits(1)  # products of a page's size lose by waiting for a second core, which an experiment has
    threading.Thread(target=_settle, args=(app.state.warm,), daemon=True).start()

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.02)
        if server.started:
            bound = server.servers[0].sockets[0].getsockname()[1]
            suffix = f"/?{urlencode({'token': token})}" if token else "/"
            opened(f"http://{host}:{bound}{suffix}")
        await serving

    try:
        asyncio.run(run())
    except SystemExit as stopped:  # uvicorn's way of saying that the address is taken
        if stopped.code:
            raise UsageError(f"cannot listen on {host}:{port}: it is in use, or not ours") from None


def _settle(warm: Callable[[], None]) -> None:
    """Load what the first readers would wait for; it stays, so that no collection of garbage need look at it again."""
    warm()
    gc.collect()
    gc.freeze()


STATIC: Mapping[str, tuple[str, Callable[[], str]]] = {
    "style.css": ("text/css; charset=utf-8", style_sheet),
    "live.js": (
        "text/javascript; charset=utf-8",
        lambda: resources.files("locally.page").joinpath("templates", "live.js").read_text(encoding="utf-8"),
    ),
}


async def _static(name: str, request: Request) -> Response:
    """A file that all pages have; a browser that has it asks only whether it is the same still."""
    if name not in STATIC:
        raise HTTPException(404, f"there is no file {name}")
    body, tag = _file(name)
    headers = {"Cache-Control": "no-cache", "ETag": tag}
    if request.headers.get("if-none-match", "") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=STATIC[name][0], headers=headers)


@cache
def _file(name: str) -> tuple[bytes, str]:
    body = STATIC[name][1]().encode()
    return body, entity_tag(body)


def say_where(address: str) -> None:
    print(f"Locally is at {address} (Ctrl-C ends it)", file=sys.stderr, flush=True)
