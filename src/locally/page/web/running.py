"""Asking for runs, following and cancelling them."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse

from locally.errors import UsageError
from locally.evidence import Scale
from locally.page.queue import Queue, State
from locally.page.shelf import Shelf
from locally.page.web.answers import Number, fields, wants_json

FOLLOW = 0.25  # seconds between looks at a run that is followed
HEARTBEAT = 15.0  # seconds after which a silent stream says that it lives


class Running:
    def __init__(self, shelf: Shelf, queue: Queue) -> None:
        self.shelf, self.queue = shelf, queue

    def router(self) -> APIRouter:
        routes = APIRouter()
        routes.post("/papers/{slug}/runs")(self.ask)
        routes.get("/requests/{request_id}")(self.request)
        routes.get("/requests/{request_id}/events")(self.events)
        routes.post("/requests/{request_id}/cancel")(self.cancel)
        return routes

    async def ask(self, request: Request, slug: str) -> Response:
        said = await fields(request)
        if slug not in self.shelf.papers():
            raise HTTPException(404, f"there is no paper {slug!r} that can be run")
        scale = said.get("scale", Scale.QUICK)
        if scale not in list(Scale):
            raise HTTPException(422, f"scale must be one of {', '.join(Scale)}")
        try:
            asked = await asyncio.to_thread(self.queue.ask, slug, Scale(scale))
        except UsageError as error:
            raise HTTPException(422, str(error)) from None
        if wants_json(request):
            return JSONResponse(_plain(asked), status_code=202)
        return RedirectResponse(f"/papers/{slug}#run", status_code=303)

    async def cancel(self, request: Request, request_id: Number) -> Response:
        await fields(request)
        ended = await asyncio.to_thread(self.queue.cancel, request_id)
        if ended is None:
            raise HTTPException(404, f"there is no request {request_id}")
        if wants_json(request):
            return JSONResponse(_plain(ended))
        return RedirectResponse(f"/papers/{ended.slug}#run", status_code=303)

    def request(self, request_id: Number) -> Response:
        found = self.queue.get(request_id)
        if found is None:
            raise HTTPException(404, f"there is no request {request_id}")
        return JSONResponse(_plain(found))

    async def events(self, request: Request, request_id: Number) -> Response:
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


def _plain(request: Any) -> dict[str, Any]:
    return asdict(request) | {"open": State(request.state).open}
