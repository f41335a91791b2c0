"""What a reader does to a paper besides running it: vote, save, mark, tag, note, comment; and a name to do it under."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from locally.errors import UsageError
from locally.page.discussion import Discussion
from locally.page.limits import Allowance
from locally.page.people import Kind, People, Person
from locally.page.shelf import Shelf
from locally.page.store import Store
from locally.page.web.answers import Answers, Number, back, enough, fields, wants_json
from locally.page.web.feed import MINE

COMMENTS = (10, 60.0)  # of one person, in seconds
CHANGES = (120, 60.0)  # of anything else
NEWCOMERS = (30, 600.0)  # people who come from one place


class TakingPart:
    def __init__(self, store: Store, shelf: Shelf, answers: Answers) -> None:
        self.shelf, self.answers = shelf, answers
        self.people, self.discussion = People(store), Discussion(store)
        self.comments, self.changes, self.newcomers = (Allowance(*a) for a in (COMMENTS, CHANGES, NEWCOMERS))

    def router(self) -> APIRouter:
        routes = APIRouter()
        routes.post("/papers/{key}/marks")(self.mark)
        routes.post("/papers/{key}/tags")(self.tag)
        routes.post("/papers/{key}/note")(self.note)
        routes.post("/papers/{key}/comments")(self.comment)
        routes.post("/comments/{number}/withdraw")(self.withdraw)
        routes.get("/me")(self.me)
        routes.post("/me")(self.rename)
        return routes

    async def mark(self, request: Request, key: str) -> Response:
        """`mark` names the kind, with a minus before it to take it back."""
        said = await fields(request)
        kind, on = said.get("mark", "").removeprefix("-"), not said.get("mark", "").startswith("-")
        if kind not in list(Kind):
            raise HTTPException(422, f"mark must be one of {', '.join(Kind)}, with a minus to take it back")

        def change(person: Person) -> dict[str, Any]:
            count = self.people.mark(person, key, Kind(kind), on)
            return {"mark": kind, "on": on, "count": count}

        return await self._changed(request, said, key, self.changes, change)

    async def tag(self, request: Request, key: str) -> Response:
        """Adds the tags in `tags`, takes away the one in `remove`."""
        said = await fields(request)

        def change(person: Person) -> dict[str, Any]:
            self.people.tag(person, key, said.get("tags", ""))
            if said.get("remove"):
                self.people.tag(person, key, said["remove"], on=False)
            return {"tags": self.people.belongings(person).of(key).tags}

        return await self._changed(request, said, key, self.changes, change, "#tags")

    async def note(self, request: Request, key: str) -> Response:
        said = await fields(request)

        def change(person: Person) -> dict[str, Any]:
            self.people.note(person, key, said.get("text", ""))
            return {"note": self.people.note_of(person, key)}

        return await self._changed(request, said, key, self.changes, change, "#note")

    async def comment(self, request: Request, key: str) -> Response:
        said = await fields(request)
        parent = said.get("parent", "")
        if parent and not (parent.isdecimal() and len(parent) < 10):
            raise HTTPException(422, "parent must be the number of a comment")

        def change(person: Person) -> dict[str, Any]:
            number = self.discussion.say(person, key, said.get("text", ""), int(parent) if parent else None)
            return {"id": number}

        return await self._changed(request, said, key, self.comments, change, "#comments")

    async def withdraw(self, request: Request, number: Number) -> Response:
        said = await fields(request)

        def carry_out() -> str | None:
            person = self.answers.identity.of(request)
            return self.discussion.withdraw(person, number) if person else None

        key = await asyncio.to_thread(carry_out)
        if key is None:
            raise HTTPException(404, "there is no such comment of yours")
        return JSONResponse({"withdrawn": number}) if wants_json(request) else back(said, f"/papers/{key}#comments")

    def me(self, request: Request) -> Response:
        me = self.answers.identity.of(request)
        kept = self.people.belongings(me)
        counts: dict[str, int] = dict.fromkeys((k for k in MINE if k in list(Kind)), 0)
        for kinds in kept.kinds.values():
            for kind in kinds:
                counts[kind] += 1
        tags: dict[str, int] = {}
        for names in kept.tags.values():
            for tag in names:
                tags[tag] = tags.get(tag, 0) + 1
        named = bool(self.answers.identity.user_header)
        return self.answers.html(
            request, "me.html", me=me, counts=counts, mines=MINE, tags=sorted(tags.items()), named=named
        )

    async def rename(self, request: Request) -> Response:
        said = await fields(request)

        def change(person: Person) -> dict[str, Any]:
            self.people.rename(person, said.get("name", ""))
            return {"name": said.get("name", "")}

        return await self._changed(request, said, "", self.changes, change)

    async def _changed(
        self,
        request: Request,
        said: dict[str, str],
        key: str,
        allowance: Allowance,
        change: Callable[[Person], dict[str, Any]],
        part: str = "",
    ) -> Response:
        """Carry out a change in the name of whoever asks, and lead back to where they were."""

        def carry_out() -> tuple[Person, dict[str, Any]]:
            if key and not self._there(key):
                raise HTTPException(404, f"there is no paper {key!r}")
            person = self.answers.identity.of(request)
            if person is None:
                enough(self.newcomers, request)
                person = self.answers.identity.settle(request)
            enough(allowance, request, person.id)
            try:
                return person, change(person)
            except UsageError as error:
                raise HTTPException(422, str(error)) from None

        person, result = await asyncio.to_thread(carry_out)
        if wants_json(request):
            response: Response = JSONResponse(result)
        else:
            response = back(said, f"/papers/{key}{part}" if key else "/me")
        self.answers.identity.remember(request, response, person)
        return response

    def _there(self, key: str) -> bool:
        return key in self.shelf.papers() or self.shelf.library.preprints.get(key) is not None
