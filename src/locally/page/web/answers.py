"""How the page answers, and how it reads forms: pages or JSON, problems told in words, secrets that forms carry."""

import json
import secrets
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from markupsafe import Markup
from pydantic import Field

from locally.page.limits import Allowance, retry_after, sender
from locally.page.report import templates
from locally.page.web.identity import Identity

COOKIE, FORM_FIELD, NEXT = "locally-form", "form_key", "next"
BODY_LIMIT = 64 * 1024  # bytes of a request
FIELDS = 50
Number = Annotated[int, Field(ge=0, lt=2**31)]  # of a row: larger ones no database takes


class Answers:
    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.environment = templates()

    def html(self, request: Request, template: str, **values: Any) -> HTMLResponse:
        """A page; its forms carry a secret that only this browser has, and the address to come back to."""
        key = request.cookies.get(COOKIE) or secrets.token_urlsafe(32)
        here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        common = {FORM_FIELD: key, "here": here, "me": values.pop("me", None) or self.identity.of(request)}
        response = HTMLResponse(self.environment.get_template(template).render(common | values))
        if COOKIE not in request.cookies:
            response.set_cookie(COOKIE, key, httponly=True, samesite="lax")
        return response

    def part(self, template: str, **values: Any) -> Markup:
        """A piece of a page that is the same for all readers."""
        return Markup(self.environment.get_template(template).render(values))

    async def problem(self, request: Request, error: Exception) -> Response:
        status, text = getattr(error, "status_code", 500), str(getattr(error, "detail", "something went wrong"))
        if isinstance(error, RequestValidationError):
            status, text = 422, "; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors())
        if wants_json(request):
            response: Response = JSONResponse({"error": text}, status_code=status)
        else:
            response = self.html(request, "problem.html", text=text)
            response.status_code = status
        response.headers.update(getattr(error, "headers", None) or {})
        return response


def wants_json(request: Request) -> bool:
    return "application/json" in request.headers.get("accept", "")


def back(fields: dict[str, str], otherwise: str) -> RedirectResponse:
    """To the page that the form was on, if that is one of ours."""
    target = fields.get(NEXT, "")
    ours = target.startswith("/") and not target.startswith("//") and "\\" not in target and target.isprintable()
    return RedirectResponse(target if ours else otherwise, status_code=303)


def enough(allowance: Allowance, request: Request, person: int | None = None) -> None:
    """Refuse what is asked for too often: by one person, or from one place."""
    host = request.client.host if request.client else ""
    if wait := allowance.take(f"person {person}" if person is not None else sender(host)):
        raise HTTPException(429, f"too much at once: try again in {wait:.0f} s", headers=retry_after(wait))


async def fields(request: Request) -> dict[str, str]:
    """What a form or a JSON object says, once it is clear that it comes from our page or from no page at all.

    A form counts only with the secret that we gave this browser, which another site cannot know. JSON needs none: a
    browser asks before it sends that across sites, and we never say yes.
    """
    body = await request.body()
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    try:
        if kind == "application/json":
            said = json.loads(body or b"{}")
            if not isinstance(said, dict):
                raise ValueError("not an object")
            said = {str(name): str(value) for name, value in said.items()}
            json.dumps(said, ensure_ascii=False).encode()  # half of a surrogate pair cannot be kept
            return said
        said = dict(parse_qsl(body.decode("utf-8"), keep_blank_values=True, max_num_fields=FIELDS))
    except (ValueError, RecursionError):
        raise HTTPException(422, "the request's body cannot be read") from None
    expected = request.cookies.get(COOKIE, "")
    if not expected or not secrets.compare_digest(expected.encode(), said.get(FORM_FIELD, "").encode()):
        raise HTTPException(403, "this form is too old or comes from elsewhere: load the page again")
    origin = request.headers.get("origin")
    if origin and origin != "null" and origin.partition("://")[2] != request.headers.get("host"):
        raise HTTPException(403, "this form comes from another site")
    return said
