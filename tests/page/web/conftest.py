"""An application over papers of the test's own and two that were fetched, and a browser of sorts."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from starlette.testclient import TestClient

from locally.page.preprints import Preprint, Preprints
from locally.page.store import Store
from locally.page.web import create_app

LOOM = Preprint(
    key="2603.00001",
    version=2,
    title="Weaving <script>alert('loom')</script> Patterns",
    authors=("Ada Lovelace", "Charles Babbage", "Mary Somerville", "Augustus De Morgan"),
    summary="A jacquard loom that weaves sparse solutions <img src=x onerror=alert(1)> from punched cards.",
    published="2026-03-01T18:00:00+00:00",
    updated="2026-03-02T00:00:00+00:00",
    day="2026-03-03",
    categories=("math.OC",),
    upvotes=42,
    sources=("arxiv", "huggingface"),
)
ORGAN = Preprint(
    key="math_0309136",
    version=1,
    title="On Barrel Organs",
    authors=("Évariste Galois",),
    summary="Pins on a barrel play melodies; groups of pins play chords.",
    published="2026-02-20T00:00:00+00:00",
    updated="2026-02-20T00:00:00+00:00",
    day="2026-02-20",
    categories=("math.GR",),
    sources=("arxiv",),
)


class Browser(TestClient):
    """Sends forms as a page has them."""

    def form_key(self) -> str:
        found = re.search(r'name="form_key" value="([^"]+)"', self.get("/").text)
        assert found is not None
        return found[1]

    def fill(self, address: str, **fields: str):
        return self.post(address, data=fields | {"form_key": self.form_key()}, follow_redirects=False)

    def titles(self, **params: str | int) -> list[str]:
        """Keys of the papers that the feed shows, in order."""
        return re.findall(r'class="title" href="/papers/([^"]+)"', self.get("/", params=params).text)


@pytest.fixture
def open_browser(add_paper) -> Iterator[Callable[..., Browser]]:
    """open_browser() is another reader of one installation; what is given by name goes to an application of its own."""
    add_paper("good")
    store = Store()
    Preprints(store).add([LOOM, ORGAN])
    plain = create_app(store)
    with ExitStack() as stack:
        stack.enter_context(TestClient(plain))  # starts and ends what runs beside the pages

        def another(headers: dict[str, str] | None = None, **arguments) -> Browser:
            app = create_app(store, **arguments) if arguments else plain
            return Browser(app, base_url="http://127.0.0.1", headers=headers)

        yield another


@pytest.fixture
def browser(open_browser) -> Browser:
    return open_browser()
