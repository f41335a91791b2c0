"""What many papers cost, night after night: processor hours, rows, bytes; and what a run costs the store.

python -m docs.capacity [DATABASE]    measure rows, bytes and times on a database of runs, by default one's own

Seconds and memory of the experiments come from `docs/evidence.jsonl`. What the store needs for them is measured on
stored runs at default scale and kept in `docs/capacity.json`.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median

import sqlalchemy as sa

from docs import records
from docs.markdown import amount, table
from locally.evidence import Evidence, Scale
from locally.page.schema import runs
from locally.page.store import Store

HERE = Path(__file__).parent
MEASURED = HERE / "capacity.json"
PAPERS, SEEDS, NIGHTS = 10_000, 10, 365
NIGHT = 8.0  # hours in which all of them have to end


@dataclass(frozen=True)
class Measured:
    """Means over the papers whose newest finished run at default scale was in the database."""

    papers: int
    seeds: float
    measures: float  # rows of measures
    figures: float  # rows of figures
    figure_bytes: float
    other_bytes: float  # what the database grows by, figures apart
    write_seconds: float  # one run into SQLite, median
    read_seconds: float  # the newest run of a paper among all that were written, median


def measure(source: Store, copies: int = 10) -> Measured:
    """Write the stored runs `copies` times over into a database of its own."""
    found = list(_newest(source))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "runs.sqlite"
        store = Store(f"sqlite:///{file}")
        empty = file.stat().st_size
        writes = [_timed(partial(store.add, e)) for _ in range(copies) for e in found]
        with store.engine.connect() as connection:
            connection.execute(sa.text("pragma wal_checkpoint(truncate)"))
        grown = (file.stat().st_size - empty) / (copies * len(found))
        reads = [_timed(partial(store.latest, e.slug)) for e in found]
    drawn = mean(sum(len(f.svg.encode()) + len(f.pdf) + len(f.png) for f in e.figures) for e in found)
    return Measured(
        papers=len(found),
        seeds=mean(len(e.seeds) for e in found),
        measures=mean(len(e.measures) for e in found),
        figures=mean(len(e.figures) for e in found),
        figure_bytes=drawn,
        other_bytes=grown - drawn,
        write_seconds=median(writes),
        read_seconds=median(reads),
    )


def _newest(source: Store) -> Iterable[Evidence]:
    for (slug,) in source.query(sa.select(runs.c.slug).where(runs.c.scale == str(Scale.DEFAULT)).distinct()):
        evidence = source.latest(slug, Scale.DEFAULT)
        if evidence is not None and evidence.status == "finished":
            yield evidence


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measured() -> Measured:
    return Measured(**json.loads(MEASURED.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Night:
    """One night of all papers, at one scale and number of seeds."""

    core_hours: float
    cores: float  # that end it within the night
    memory_gib: float  # on all of them together, were each job of the mean size
    rows: float
    gigabytes: float
    without_figures: float  # gigabytes
    write_minutes: float


def night(papers: int = PAPERS, seeds: int = SEEDS) -> Night:
    """As if the papers to come cost what those of today cost on average; time and rows grow with the seeds."""
    stored, sizes = list(records.runs().values()), measured()
    cores = stored[0]["machine"]["cores"]
    seconds = mean(run["seconds"] * cores * seeds / len(run["seeds"]) for run in stored)
    hours = papers * seconds / 3600
    memory = mean(run["peak_memory_mib"] for run in stored) / 1024 / cores
    rows = papers * (1 + sizes.figures + sizes.measures * seeds / sizes.seeds)
    plain = papers * sizes.other_bytes * seeds / sizes.seeds / 1e9
    return Night(
        core_hours=hours,
        cores=hours / NIGHT,
        memory_gib=memory * hours / NIGHT,
        rows=rows,
        gigabytes=plain + papers * sizes.figure_bytes / 1e9,
        without_figures=plain,
        write_minutes=papers * sizes.write_seconds / 60,
    )


def per_night() -> str:
    sizes = (len(records.runs()), 100, 1000, PAPERS)
    nights = [night(papers) for papers in sizes]
    rows = [
        ("Core hours", [n.core_hours for n in nights]),
        (f"Cores that do it in {NIGHT:.0f} hours", [n.cores for n in nights]),
        ("GiB of memory on all of them", [n.memory_gib for n in nights]),
        ("Rows", [n.rows for n in nights]),
        ("GB in the store", [n.gigabytes for n in nights]),
        ("GB in the store after a year", [NIGHTS * n.gigabytes for n in nights]),
        ("the same without figures", [NIGHTS * n.without_figures for n in nights]),
        ("Minutes of writing", [n.write_minutes for n in nights]),
    ]
    head = ("A night of", *(f"{papers:,} papers" for papers in sizes))
    return table(head, [(name, *map(amount, values)) for name, values in rows])


def basis() -> str:
    stored, sizes = list(records.runs().values()), measured()
    cores = stored[0]["machine"]["cores"]
    seconds = [run["seconds"] for run in stored]
    memory = [run["peak_memory_mib"] for run in stored]
    rows = [
        ("Papers measured for time and memory", len(stored)),
        (
            "Seconds of an experiment, default scale, 5 seeds",
            f"mean {amount(mean(seconds))}, median {amount(median(seconds))}",
        ),
        ("Cores that it had", cores),
        ("Peak memory, MiB", f"mean {amount(mean(memory))}, largest {amount(max(memory))}"),
        ("Papers measured for the store", sizes.papers),
        ("Rows of measures a run", amount(sizes.measures)),
        ("Figures a run", amount(sizes.figures)),
        ("Bytes of figures a run (SVG, PDF, PNG)", amount(sizes.figure_bytes)),
        ("Bytes of everything else a run", amount(sizes.other_bytes)),
        ("Milliseconds to write a run to SQLite", amount(sizes.write_seconds * 1000)),
        ("Runs a second that one SQLite file takes at most", amount(1 / sizes.write_seconds)),
        ("Milliseconds to read a paper's newest run", amount(sizes.read_seconds * 1000)),
    ]
    return table(("Measured", ""), rows)


if __name__ == "__main__":
    url = f"sqlite:///{Path(sys.argv[1]).resolve()}" if len(sys.argv) > 1 else None
    MEASURED.write_text(json.dumps(asdict(measure(Store(url))), indent=1) + "\n", encoding="utf-8")
