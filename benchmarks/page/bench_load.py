"""A page with 50,000 fetched papers and 100,000 runs under 16 readers at once, while an experiment runs.

Each reader opens feed, searches and papers' pages in turn and reads for a second or so before the next; the same is
done once more by readers that never pause, which tells how much the server can take. Both run on the cores that the
server and the experiment have to share with them. Then: how long `locally fetch` takes for 2,000 papers beside its
network, and how soon Chromium paints the feed.

LOCALLY_LOAD names a folder in which the database is kept for the next time; it takes minutes to write and to index.
"""

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from urllib.parse import parse_qs, quote, urlsplit
from xml.sax.saxutils import escape

import numpy as np
import psutil

from benchmarks.harness import Comparison
from benchmarks.page.collection import PAPERS, RUNS, Writer, fill
from locally import catalogue
from locally.page.preprints import Preprint
from locally.page.shelf import Shelf
from locally.page.store import Store

READERS = 16
SECONDS = 20.0  # of each measurement
PAUSE = 1.0  # mean seconds that a reader reads
FETCHED = 2_000
EXPERIMENT = "learning-to-relax"  # what runs meanwhile, at the scale of a minute
TARGETS = {"median": 50.0, "p99": 150.0}  # ms


@dataclass(frozen=True)
class Reading:
    """Milliseconds of every answer by kind of page, and seconds of processor time that server and readers took."""

    taken: dict[str, list[float]]
    server: float
    own: float


def main() -> list[Comparison]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(os.environ.get("LOCALLY_LOAD", scratch))
        os.environ["LOCALLY_HOME"] = str(folder)
        results = []
        if not (folder / "filled.json").exists():
            results.append(_build(folder))
        titles = json.loads((folder / "filled.json").read_text())
        with _serving() as (port, server):
            asked = _addresses(titles)
            for kind in asked:
                _get(port, asked[kind][0])  # what is loaded on first use is loaded
            for pause in (PAUSE, 0.0):
                results += _report(_read(port, asked, pause, server), pause)
            results += _paint(port)
        results.append(_fetch())
    return results


def _build(folder: Path) -> Comparison:
    folder.mkdir(parents=True, exist_ok=True)
    store = Store()
    papers = fill(store)
    start = time.perf_counter()
    Shelf(store).refresh()
    seconds = time.perf_counter() - start
    (folder / "filled.json").write_text(json.dumps([(p.key, p.title) for p in papers[::97]]))
    return _figure(f"indexing {PAPERS} papers", "seconds", seconds)


@contextmanager
def _serving() -> Iterator[tuple[int, psutil.Process]]:
    command = [sys.executable, "-m", "locally.cli", "serve", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        port = int(re.search(r":(\d+)/", process.stderr.readline())[1])  # type: ignore[index]
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def _processor(server: psutil.Process) -> float:
    """Seconds of processor time so far, without those of the experiment, which is a process of its own."""
    spent = server.cpu_times()
    return float(spent.user + spent.system)


def _addresses(titles: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """What readers open, by kind of page."""
    rng, seen = np.random.default_rng(0), Counter(w for _, title in titles for w in set(title.lower().split()))
    telling = [[w for w in title.lower().split() if seen[w] < len(titles) / 10] for _, title in titles]  # no stop words
    words = [" ".join(rng.choice(w, 2, replace=False)) for w in telling if len(w) > 1]
    slugs = [p.slug for p in catalogue.load() if p.runnable]
    keys = [key for key, _ in titles]
    return {
        "feed": ["/", "/?order=newest", "/?order=trending", "/?order=newest&page=7", "/?wing=privacy", "/?period=week"],
        "search": [f"/?q={quote(w)}" for w in words],
        "paper": [f"/papers/{name}" for pair in zip(slugs, keys, strict=False) for name in pair],
    }


def _read(port: int, asked: dict[str, list[str]], pause: float, server: psutil.Process) -> Reading:
    """All readers together, while an experiment runs."""

    async def read() -> Reading:
        stop = asyncio.Event()
        experiment = asyncio.create_task(_keep_running(port, stop))
        await asyncio.sleep(3.0)  # it has begun
        before, own = _processor(server), time.process_time()
        until = time.perf_counter() + SECONDS
        readers = await asyncio.gather(*(_reader(i, port, asked, pause, until) for i in range(READERS)))
        reading = Reading(defaultdict(list), _processor(server) - before, time.process_time() - own)
        for kind, milliseconds in (answer for answers in readers for answer in answers):
            reading.taken[kind].append(milliseconds)
        stop.set()
        await experiment
        return reading

    return asyncio.run(read())


async def _reader(
    number: int, port: int, asked: dict[str, list[str]], pause: float, until: float
) -> list[tuple[str, float]]:
    """One person: (kind of page, milliseconds to its last byte) of all that was opened, over one connection."""
    rng = np.random.default_rng(number)
    own_address = (f"127.0.0.{2 + number}", 0)  # what one reader may search for in a time is bounded
    stream, sink = await asyncio.open_connection("127.0.0.1", port, local_addr=own_address, limit=2**20)
    taken = []
    await asyncio.sleep(float(rng.random()) * pause)
    while time.perf_counter() < until:
        kind = list(asked)[int(rng.integers(len(asked)))]
        address = asked[kind][int(rng.integers(len(asked[kind])))]
        start = time.perf_counter()
        await _open(stream, sink, port, address)
        taken.append((kind, 1e3 * (time.perf_counter() - start)))
        if pause:
            await asyncio.sleep(float(rng.exponential(pause)))
    sink.close()
    return taken


async def _open(stream: asyncio.StreamReader, sink: asyncio.StreamWriter, port: int, address: str) -> None:
    """Ask for a page and take it in. Bare of all that a client does besides: it shares the server's cores."""
    sink.write(f"GET {address} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    head = await stream.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"{address} answered {head.splitlines()[0].decode()}")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    assert length is not None
    await stream.readexactly(int(length[1]))


async def _keep_running(port: int, stop: asyncio.Event) -> None:
    """One experiment after the other; asking for one that runs starts none."""
    while True:
        answer = await asyncio.to_thread(_post, port, f"/papers/{EXPERIMENT}/runs", {"scale": "default"})
        asked = json.loads(answer)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 1.0)
            await asyncio.to_thread(_post, port, f"/requests/{asked['id']}/cancel", {})
            return


def _report(reading: Reading, pause: float) -> list[Comparison]:
    pace = "with pauses" if pause else "without pauses"
    results = []
    for kind, values in reading.taken.items():
        for name, share in (("median", 50), ("p99", 99)):
            value = float(np.percentile(values, share))
            about = {"target": TARGETS[name], "answers": len(values)}
            results.append(_figure(f"{kind}, {READERS} readers {pace}", f"ms, {name}", value, **about))
    total = sum(map(len, reading.taken.values()))
    load = psutil.getloadavg()[0] / (os.cpu_count() or 1)  # above 1 others want the cores as well
    about = {"load_per_core": round(load, 2)}
    results.append(_figure(f"{READERS} readers {pace}", "answers a second", total / SECONDS, **about))
    spent = (("of the server", reading.server), ("of the readers", reading.own))
    for whose, seconds in spent:
        quantity = f"processor ms an answer, {whose}"
        results.append(_figure(f"{READERS} readers {pace}", quantity, 1e3 * seconds / total, **about))
    return results


def _paint(port: int) -> list[Comparison]:
    """Milliseconds until something of the feed is seen, in a browser that has seen nothing of it before."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("  first paint: skipped, Chromium is not installed")
        return []
    from playwright.sync_api import sync_playwright

    script = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    times = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(7):
            context = browser.new_context()
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{port}/")
            while (painted := page.evaluate(script)) is None:
                time.sleep(0.05)
            times.append(float(painted))
            context.close()
        browser.close()
    return [
        _figure("first paint of the feed", "ms, median", median(times[1:]), low=min(times[1:]), high=max(times[1:]))
    ]


def _fetch() -> Comparison:
    """Seconds of `locally fetch` and of the search index for 2,000 papers that a server beside it hands out at once."""
    now = int(time.time())
    writer, month = Writer(seed=now), f"{30 + now % 70}{1 + now // 70 % 12:02d}"  # another each time: they must be new
    entries = [_entry(writer, i, month) for i in range(FETCHED)]

    class Archive(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = {name: value[0] for name, value in parse_qs(urlsplit(self.path).query).items()}
            first, count = int(asked.get("start", 0)), int(asked.get("max_results", 100))
            body = _feed(entries[first : first + count]).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/atom+xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Archive)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [sys.executable, "-m", "locally.cli", "fetch", "--source", "arxiv", "--category", "cs.LG", "--pause", "0"]
    start = time.perf_counter()
    ended = subprocess.run(
        [*command, "--arxiv-url", f"http://127.0.0.1:{server.server_port}/api/query"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = time.perf_counter() - start
    server.shutdown()
    if f"{FETCHED} new" not in ended.stdout:
        raise RuntimeError(ended.stdout + ended.stderr)
    shelf = Shelf(Store())
    shelf.refresh()
    total = time.perf_counter() - start
    return _figure(f"fetch of {FETCHED} papers", "seconds", total, target=30.0, without_index=imported)


def _entry(writer: Writer, number: int, month: str) -> Preprint:
    return replace(writer.preprint(number, datetime.now(UTC)), key=f"{month}.{number:05d}")


def _feed(entries: Sequence[Preprint]) -> str:
    shown = "".join(
        f"<entry><id>http://arxiv.org/abs/{p.key}v1</id><title>{escape(p.title)}</title>"
        f"<summary>{escape(p.summary)}</summary><published>{p.published}</published><updated>{p.updated}</updated>"
        + "".join(f"<author><name>{escape(name)}</name></author>" for name in p.authors)
        + '<category term="cs.LG"/></entry>'
        for p in entries
    )
    total = f"<o:totalResults xmlns:o='http://a9.com/-/spec/opensearch/1.1/'>{FETCHED}</o:totalResults>"
    return f"<feed xmlns='http://www.w3.org/2005/Atom'>{total}{shown}</feed>"


def _get(port: int, address: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("GET", address)
    connection.getresponse().read()


def _post(port: int, address: str, said: dict[str, str]) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"content-type": "application/json", "accept": "application/json"}
    connection.request("POST", address, json.dumps(said), headers)
    return connection.getresponse().read()


def _figure(
    name: str, quantity: str, value: float, *, low: float | None = None, high: float | None = None, **detail: float
) -> Comparison:
    low, high = value if low is None else low, value if high is None else high
    return Comparison(name, quantity, value, low, high, "page", detail=detail | {"papers": PAPERS, "runs": RUNS})


if __name__ == "__main__":
    for line in main():
        print(line)
