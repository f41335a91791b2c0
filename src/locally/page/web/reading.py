"""One paper: its page, its records and figures, two of its runs side by side; and what came out, as a feed."""

from collections.abc import Callable, Mapping

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from markupsafe import Markup

from locally.evidence import Evidence, Paper, Scale
from locally.page.compare import compare
from locally.page.discussion import Discussion
from locally.page.feed import ENTRIES, atom, entity_tag
from locally.page.library import Order
from locally.page.people import People, Person
from locally.page.preprints import Preprint
from locally.page.queue import Queue
from locally.page.report import KINDS, records_csv, view
from locally.page.shelf import Shelf
from locally.page.store import Store
from locally.page.trending import Trending
from locally.page.web.answers import Answers, Number
from locally.page.web.lines import Lines

SIMILAR = 5
MEDIA = {"svg": "image/svg+xml", "pdf": "application/pdf", "png": "image/png"}


class Reading:
    def __init__(
        self, store: Store, shelf: Shelf, queue: Queue, lines: Lines, trending: Trending, answers: Answers
    ) -> None:
        self.store, self.shelf, self.queue, self.lines = store, shelf, queue, lines
        self.trending, self.answers = trending, answers
        self.people, self.discussion = People(store), Discussion(store)
        self._written: dict[tuple[str, str], tuple[object, Markup]] = {}

    def router(self) -> APIRouter:
        routes = APIRouter()
        routes.get("/papers/{slug}", response_class=HTMLResponse)(self.paper)
        routes.get("/papers/{slug}/compare", response_class=HTMLResponse)(self.compare)
        routes.get("/papers/{slug}/records.csv")(self.records)
        routes.get("/papers/{slug}/figures/{name}")(self.figure)
        routes.get("/feed.atom")(self.atom)
        return routes

    def paper(self, request: Request, slug: str, run: Number | None = None) -> Response:
        cards = self.shelf.refresh()
        if slug not in cards:
            return self._fetched(request, slug, cards)
        paper = cards[slug]
        article, history = self._told(paper), self._history(paper)
        if run is not None:
            article = self._article(paper, self._evidence(slug, run), f"?run={run}")
        self.trending.view(slug)
        me = self.answers.identity.of(request)
        return self.answers.html(
            request,
            "served.html",
            me=me,
            paper=paper,
            article=article,
            history=history,
            scales=[s for s in Scale if s is not Scale.PAPER or self.queue.data],
            asked=self.queue.of(slug),
            run=run,
            **self._around(slug, cards, me),
        )

    def _fetched(self, request: Request, key: str, cards: Mapping[str, Paper]) -> Response:
        twin = self.shelf.library.twins.get(key)
        if twin is not None:
            return RedirectResponse(f"/papers/{twin.slug}", status_code=307)
        preprint = self.shelf.library.preprints.get(key)
        if preprint is None:
            raise HTTPException(404, f"there is no paper {key!r}")
        self.trending.view(key)
        me = self.answers.identity.of(request)
        return self.answers.html(request, "preprint.html", me=me, preprint=preprint, **self._around(key, cards, me))

    def _told(self, paper: Paper) -> Markup:
        """What the paper claims and its last run found."""
        return self._as_of(paper, "article", lambda: self._article(paper, self.store.latest(paper.slug)))

    def _history(self, paper: Paper) -> Markup:
        return self._as_of(paper, "history", lambda: self._runs(paper))

    def _as_of(self, paper: Paper, part: str, write: Callable[[], Markup]) -> Markup:
        """A part of a page that changes with the card or a new run only, written once for each."""
        state = paper, self.lines.last_runs().get(paper.slug)
        written = self._written.get((paper.slug, part))
        if written is None or written[0] != state:
            written = self._written[paper.slug, part] = state, write()
        return written[1]

    def _article(self, paper: Paper, evidence: Evidence | None, chosen: str = "") -> Markup:
        at = f"/papers/{paper.slug}"
        shown = view(paper, evidence, records=f"{at}/records.csv{chosen}", figures=at + "/figures/{i}.{kind}" + chosen)
        return self.answers.part("paper.html", view=shown, home="/")

    def _runs(self, paper: Paper) -> Markup:
        history = self.store.glance(paper.slug)
        if len(history) < 2:
            return Markup("")
        spark = self.lines.spark(paper, self.lines.last_runs().get(paper.slug))
        return self.answers.part("history.html", slug=paper.slug, history=history, spark=spark, kinds=KINDS)

    def _around(self, key: str, cards: Mapping[str, Paper], me: Person | None) -> dict[str, object]:
        """What stands around any paper: what people and this reader say of it, and what is like it."""
        kept = self.people.belongings(me)
        similar = [k for k in self.shelf.index.similar(key, SIMILAR + 1) if self.shelf.library.has(k)]
        line, *others = self.lines.of([key, *similar[:SIMILAR]], cards, kept)
        return {
            "line": line,
            "note": self.people.note_of(me, key) if me else "",
            "threads": self.discussion.about(key),
            "similar": others,
        }

    def compare(self, request: Request, slug: str, a: Number, b: Number) -> Response:
        paper = self._card(slug)
        first, second = self._evidence(slug, a), self._evidence(slug, b)
        assert first is not None
        assert second is not None
        return self.answers.html(
            request, "compare.html", paper=paper, a=a, b=b, runs=(first, second), found=compare(first, second),
            kinds=KINDS, history=self.store.glance(slug),
        )  # fmt: skip

    def records(self, slug: str, run: Number | None = None) -> Response:
        self._card(slug)
        evidence = self._evidence(slug, run)
        if evidence is None:
            raise HTTPException(404, f"{slug} has not run yet")
        headers = {"Content-Disposition": f'attachment; filename="{slug}.csv"'}
        return Response(records_csv(evidence.measures), media_type="text/csv; charset=utf-8", headers=headers)

    def figure(self, slug: str, name: str, run: Number | None = None) -> Response:
        self._card(slug)
        evidence = self._evidence(slug, run)
        stem, _, kind = name.partition(".")
        figures = evidence.figures if evidence else ()
        if kind not in MEDIA or not stem.isdecimal() or len(stem) > 3 or not 1 <= int(stem) <= len(figures):
            raise HTTPException(404, f"{slug} has no figure {name}")
        return Response(getattr(figures[int(stem) - 1], kind), media_type=MEDIA[kind])

    def atom(self, request: Request, wing: str = "") -> Response:
        papers = [p for p in self.shelf.refresh().values() if not wing or p.wing == wing]
        if not papers:
            raise HTTPException(404, f"there is no wing {wing!r}")
        body = atom(papers, self.lines.last_runs(), str(request.base_url), wing, self._lately_fetched(wing))
        unchanged = request.headers.get("if-none-match", "") == entity_tag(body)
        headers = {"ETag": entity_tag(body), "Cache-Control": "no-cache"}
        if unchanged:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type="application/atom+xml", headers=headers)

    def _lately_fetched(self, wing: str) -> list[Preprint]:
        """The newest fetched papers; of a wing, those of which it has a card."""
        library = self.shelf.library
        keys = [key for key, card in library.twins.items() if not wing or card.wing == wing]
        if not wing:
            keys += library.keys(Order.NEWEST).only((), fetched=True)[:ENTRIES]
        return list(library.preprints.many(keys).values())

    def _card(self, slug: str) -> Paper:
        paper = self.shelf.papers().get(slug)
        if paper is None:
            raise HTTPException(404, f"there is no paper {slug!r}")
        return paper

    def _evidence(self, slug: str, run: int | None) -> Evidence | None:
        if run is None:
            return self.store.latest(slug)
        found = self.store.run(run) if 0 < run < 2**63 else None
        if found is None or found.slug != slug:
            raise HTTPException(404, f"{slug} has no run {run}")
        return found
