"""The page itself: papers to read, to search and to run, served to a browser.

Reading works without JavaScript; with it, results come as one types and a run is followed as it goes. What a paper says
of itself is hostile input: templates escape it and no script but ours runs.
"""

import asyncio
import json
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from locally.errors import UsageError

try:
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, StreamingResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware
except ModuleNotFoundError as missing:
    raise UsageError(f"the page needs {missing.name}: pip install 'locally[page]'") from None

from locally import catalogue
from locally.evidence import Evidence, Paper, Scale
from locally.page import LOOPBACK
from locally.page.feed import atom
from locally.page.glance import LastRun, last_runs
from locally.page.queue import Queue, State
from locally.page.report import KINDS, records_csv, short_authors, style_sheet, tally, templates, unrun_label, view
from locally.page.search import Index
from locally.page.store import Store

COOKIE, FORM_FIELD = "locally-form", "form_key"
TOKEN_COOKIE = "locally-token"
BODY_LIMIT = 64 * 1024  # bytes of a request
FOLLOW = 0.25  # seconds between looks at a run that is followed
HEARTBEAT = 15.0  # seconds after which a silent stream says that it lives
SIMILAR = 4
ORDERS = {"number": "by number", "newest": "newest paper first", "ran": "last run first"}
MEDIA = {"svg": "image/svg+xml", "pdf": "application/pdf", "png": "image/png"}
HEADERS = {
    # plots carry their styles inline, hence 'unsafe-inline' there; scripts come from a file of ours only
    "Content-Security-Policy": "default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True)
class Line:
    """A paper in the feed."""

    paper: Paper
    authors: str
    label: str
    kind: str
    last: LastRun | None


class Shelf:
    """The catalogue as the page shows it, read again when a card has changed."""

    def __init__(self) -> None:
        self._seen: list[Paper] = []
        self._index: Index | None = None

    def papers(self) -> dict[str, Paper]:
        papers = catalogue.load()
        if papers != self._seen:
            self._seen, self._index = papers, None
        return {p.slug: p for p in papers}

    @property
    def index(self) -> Index:
        self.papers()
        if self._index is None:
            self._index = Index(self._seen)
        return self._index


def create_app(
    store: Store, *, at_once: int = 1, data: str = "", token: str | None = None, hosts: tuple[str, ...] = LOOPBACK
) -> FastAPI:
    """The application; its queue starts and stops with it.

    Args:
        store: where evidence and requests are kept.
        at_once: experiments side by side.
        data: folder with the user's data sets, "" for none.
        token: who does not know it sees nothing; None for a page that only this machine can reach.
        hosts: names under which the page may be called.
    """
    shelf = Shelf()
    queue = Queue(store, shelf.papers, at_once=at_once, data=data)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        queue.start()
        yield
        await asyncio.to_thread(queue.close)

    app = FastAPI(lifespan=lifespan, title="Locally", openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*(h.strip("[]") for h in hosts), *hosts])
    app.middleware("http")(_guarded(token))
    pages = _Pages(store, shelf, queue)
    app.get("/", response_class=HTMLResponse)(pages.feed)
    app.get("/papers/{slug}", response_class=HTMLResponse)(pages.paper)
    app.get("/papers/{slug}/records.csv")(pages.records)
    app.get("/papers/{slug}/figures/{name}")(pages.figure)
    app.post("/papers/{slug}/runs")(pages.ask)
    app.get("/requests/{request_id}")(pages.request)
    app.get("/requests/{request_id}/events")(pages.events)
    app.post("/requests/{request_id}/cancel")(pages.cancel)
    app.get("/feed.atom")(pages.atom)
    app.get("/static/{name}")(_static)
    app.exception_handler(HTTPException)(pages.problem)
    app.exception_handler(404)(pages.problem)
    return app


def serve(
    store: Store, *, host: str, port: int, at_once: int, data: str, token: str | None, opened: Callable[[str], None]
) -> None:
    """Serve until interrupted; `opened` is called with the page's address once it answers."""
    import uvicorn

    hosts = LOOPBACK if host in LOOPBACK else ("*",)
    app = create_app(store, at_once=at_once, data=data, token=token, hosts=hosts)
    server = uvicorn.Server(
        uvicorn.Config(app, host=host.strip("[]"), port=port, log_level="warning", timeout_graceful_shutdown=3)
    )

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


class _Pages:
    """What answers each address."""

    def __init__(self, store: Store, shelf: Shelf, queue: Queue) -> None:
        self.store, self.shelf, self.queue = store, shelf, queue
        self.environment = templates()

    # Reading ----------------------------------------------------------------------------------------------------

    def feed(self, request: Request, q: str = "", wing: str = "", verdict: str = "", order: str = "number") -> Response:
        papers, last = self.shelf.papers(), last_runs()
        found = self.shelf.index.search(q) if q.strip() else list(papers.values())
        lines = [_line(p, last.get(p.slug)) for p in found]
        badges = tally((line.label, line.kind) for line in lines)
        shown = [
            line for line in lines if (not wing or line.paper.wing == wing) and (not verdict or line.label == verdict)
        ]
        if order == "newest":
            shown.sort(key=lambda line: line.paper.published, reverse=True)
        elif order == "ran":
            shown.sort(key=lambda line: line.last.started if line.last else "", reverse=True)
        return self._html(
            request,
            "list.html" if request.headers.get("x-part") == "list" else "feed.html",
            lines=shown,
            tally=badges,
            wings=sorted({p.wing for p in papers.values()}),
            q=q,
            wing=wing,
            verdict=verdict,
            order=order,
            orders=ORDERS,
            open=self.queue.open(),
            titles={slug: p.title for slug, p in papers.items()},
        )

    def paper(self, request: Request, slug: str, run: int | None = None) -> Response:
        paper = self._paper(slug)
        evidence = self._evidence(slug, run)
        chosen = f"?run={run}" if run is not None else ""
        records, figures = f"/papers/{slug}/records.csv{chosen}", "/papers/{slug}/figures/{i}.{kind}" + chosen
        last = last_runs()
        return self._html(
            request,
            "served.html",
            view=view(paper, evidence, records=records, figures=figures),
            home="/",
            scales=[s for s in Scale if s is not Scale.PAPER or self.queue.data],
            asked=self.queue.of(slug),
            history=self.store.glance(slug),
            kinds=KINDS,
            run=run,
            similar=[_line(p, last.get(p.slug)) for p in self.shelf.index.similar(slug, SIMILAR)],
        )

    def records(self, slug: str, run: int | None = None) -> Response:
        evidence = self._evidence(slug, run)
        if evidence is None:
            raise HTTPException(404, f"{slug} has not run yet")
        headers = {"Content-Disposition": f'attachment; filename="{slug}.csv"'}
        return Response(records_csv(evidence.measures), media_type="text/csv; charset=utf-8", headers=headers)

    def figure(self, slug: str, name: str, run: int | None = None) -> Response:
        evidence = self._evidence(slug, run)
        stem, _, kind = name.partition(".")
        figures = evidence.figures if evidence else ()
        if kind not in MEDIA or not stem.isdigit() or not 1 <= int(stem) <= len(figures):
            raise HTTPException(404, f"{slug} has no figure {name}")
        return Response(getattr(figures[int(stem) - 1], kind), media_type=MEDIA[kind])

    def atom(self, request: Request, wing: str = "") -> Response:
        papers = [p for p in self.shelf.papers().values() if not wing or p.wing == wing]
        if not papers:
            raise HTTPException(404, f"there is no wing {wing!r}")
        return Response(atom(papers, last_runs(), str(request.base_url), wing), media_type="application/atom+xml")

    # Running ----------------------------------------------------------------------------------------------------

    async def ask(self, request: Request, slug: str) -> Response:
        fields = await _fields(request)
        self._paper(slug)
        scale = fields.get("scale", Scale.QUICK)
        if scale not in list(Scale):
            raise HTTPException(422, f"scale must be one of {', '.join(Scale)}")
        try:
            asked = await asyncio.to_thread(self.queue.ask, slug, Scale(scale))
        except UsageError as error:
            raise HTTPException(422, str(error)) from None
        if _wants_json(request):
            return JSONResponse(_plain(asked), status_code=202)
        return RedirectResponse(f"/papers/{slug}#run", status_code=303)

    async def cancel(self, request: Request, request_id: int) -> Response:
        await _fields(request)
        ended = await asyncio.to_thread(self.queue.cancel, request_id)
        if ended is None:
            raise HTTPException(404, f"there is no request {request_id}")
        if _wants_json(request):
            return JSONResponse(_plain(ended))
        return RedirectResponse(f"/papers/{ended.slug}#run", status_code=303)

    def request(self, request_id: int) -> Response:
        found = self.queue.get(request_id)
        if found is None:
            raise HTTPException(404, f"there is no request {request_id}")
        return JSONResponse(_plain(found))

    async def events(self, request: Request, request_id: int) -> Response:
        """The request as it changes, one server-sent event a change, until it ends."""
        if await asyncio.to_thread(self.queue.get, request_id) is None:
            raise HTTPException(404, f"there is no request {request_id}")

        async def stream() -> AsyncIterator[str]:
            said, silent = "", 0.0
            while not await request.is_disconnected():
                now = await asyncio.to_thread(self.queue.get, request_id)
                if now is None:
                    return
                text = json.dumps(_plain(now))
                if text != said:
                    yield f"data: {text}\n\n"
                    said, silent = text, 0.0
                elif silent >= HEARTBEAT:
                    yield ": still there\n\n"
                    silent = 0.0
                if not now.state.open:
                    return
                await asyncio.sleep(FOLLOW)
                silent += FOLLOW

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    # Shared -----------------------------------------------------------------------------------------------------

    async def problem(self, request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        text = str(getattr(error, "detail", "something went wrong"))
        if _wants_json(request):
            return JSONResponse({"error": text}, status_code=status)
        response = self._html(request, "problem.html", text=text)
        response.status_code = status
        return response

    def _paper(self, slug: str) -> Paper:
        paper = self.shelf.papers().get(slug)
        if paper is None:
            raise HTTPException(404, f"there is no paper {slug!r}")
        return paper

    def _evidence(self, slug: str, run: int | None) -> Evidence | None:
        self._paper(slug)
        if run is None:
            return self.store.latest(slug)
        found = self.store.run(run)
        if found is None or found.slug != slug:
            raise HTTPException(404, f"{slug} has no run {run}")
        return found

    def _html(self, request: Request, template: str, **values: Any) -> HTMLResponse:
        key = request.cookies.get(COOKIE) or secrets.token_urlsafe(32)
        page = self.environment.get_template(template).render(form_key=key, **values)
        response = HTMLResponse(page)
        if COOKIE not in request.cookies:
            response.set_cookie(COOKIE, key, httponly=True, samesite="strict")
        return response


def _line(paper: Paper, last: LastRun | None) -> Line:
    label = last.label if last else unrun_label(paper)
    return Line(paper, short_authors(paper), label, KINDS[label], last)


def _plain(request: Any) -> dict[str, Any]:
    return asdict(request) | {"open": State(request.state).open}


def _wants_json(request: Request) -> bool:
    return "application/json" in request.headers.get("accept", "")


async def _fields(request: Request) -> dict[str, str]:
    """What a form or a JSON object says, once it is clear that it comes from our page or from no page at all.

    A form counts only with the secret that we gave this browser, which another site cannot know. JSON needs none: a
    browser asks before it sends that across sites, and we never say yes.
    """
    body = await request.body()
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    try:
        if kind == "application/json":
            fields = json.loads(body or b"{}")
            if not isinstance(fields, dict):
                raise ValueError("not an object")
            return {str(name): str(value) for name, value in fields.items()}
        fields = dict(parse_qsl(body.decode("utf-8"), strict_parsing=bool(body)))
    except ValueError:
        raise HTTPException(422, "the request's body cannot be read") from None
    expected = request.cookies.get(COOKIE, "")
    if not expected or not secrets.compare_digest(expected.encode(), fields.get(FORM_FIELD, "").encode()):
        raise HTTPException(403, "this form is too old or comes from elsewhere: load the page again")
    origin = request.headers.get("origin")
    if origin and origin != "null" and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, "this form comes from another site")
    return fields


def _guarded(token: str | None) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if (size := request.headers.get("content-length", "0")) and (not size.isdigit() or int(size) > BODY_LIMIT):
            response: Response = Response("request too large", 413)
        elif token is not None and not _knows(request, token):
            response = Response("this page needs its token: open the address that `locally serve` printed", 401)
        elif token is not None and "token" in request.query_params:
            response = RedirectResponse(request.url.path, 303)  # keep the secret out of the address bar
            response.set_cookie(TOKEN_COOKIE, token, httponly=True, samesite="strict")
        else:
            response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    return guard


def _knows(request: Request, token: str) -> bool:
    bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
    offered = (request.query_params.get("token", ""), request.cookies.get(TOKEN_COOKIE, ""), bearer)
    return any(secrets.compare_digest(o.encode(), token.encode()) for o in offered)


STATIC: Mapping[str, tuple[str, Callable[[], str]]] = {
    "style.css": ("text/css; charset=utf-8", style_sheet),
    "live.js": (
        "text/javascript; charset=utf-8",
        lambda: resources.files("locally.page").joinpath("templates", "live.js").read_text(encoding="utf-8"),
    ),
}


def _static(name: str) -> Response:
    if name not in STATIC:
        raise HTTPException(404, f"there is no file {name}")
    kind, read = STATIC[name]
    return Response(read(), media_type=kind, headers={"Cache-Control": "no-cache"})


def say_where(address: str) -> None:
    print(f"Locally is at {address} (Ctrl-C ends it)", file=sys.stderr, flush=True)
