"""Where the slowest experiments spend their time: one seed of each in this process, on one core.

python -m benchmarks.profiles [COUNT]    the slowest by their stored runs at default scale; ten by default

Prints a table and writes it to `docs/profiles.md`. A function's share is what passes between its call and its return;
work of libraries counts for the function of ours that calls them.
"""

import cProfile
import pstats
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.markdown import table
from docs.records import runs
from locally import catalogue
from locally.evidence import Run, Scale

WRITTEN = Path(__file__).parent.parent / "docs" / "profiles.md"
PACKAGE = Path(catalogue.__file__).parent
SHOWN = 4  # functions of each
LEAST = 0.05  # share that is worth a line
HEAD = (
    "# Profiles of the slowest experiments\n\n"
    "One seed at default scale in one process on one core, imports apart, by `python -m benchmarks.profiles`; the "
    "profiler itself slows down what consists of small calls. Shares include what a function calls.\n\n"
)


def main(count: int) -> None:
    slowest = sorted(runs().values(), key=lambda run: -run["seconds"])[:count]
    papers = catalogue.load([catalogue.BUILT_IN])
    rows = []
    for stored in slowest:
        paper = catalogue.find(papers, stored["slug"])
        seconds, shares = profile(catalogue.experiment(paper))
        said = "; ".join(f"{share:.0%} `{name}`" for name, share in shares)
        rows.append((paper.slug, f"{stored['seconds']:.0f}", f"{seconds:.0f}", said))
        print(*rows[-1], sep="  ", flush=True)
    head = ("Experiment", "Seconds, all seeds", "Seconds, one seed", "Where")
    WRITTEN.write_text(HEAD + table(head, rows) + "\n", encoding="utf-8")


def profile(experiment: Any) -> tuple[float, list[tuple[str, float]]]:
    """Seconds, and the functions of the methods that take the largest shares of them."""
    profiler = cProfile.Profile()
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(scale=Scale.DEFAULT, seeds=(0,), device="cpu", scratch=Path(scratch))
        began = time.perf_counter()
        profiler.runcall(experiment, run)
        seconds = time.perf_counter() - began
    shares = sorted(methods(pstats.Stats(profiler)), key=lambda found: -found[1])
    return seconds, [(name, s / seconds) for name, s in shares if s >= LEAST * seconds][:SHOWN]


def methods(stats: pstats.Stats) -> Iterator[tuple[str, float]]:
    """Seconds in each function of the rooms of methods; experiments and what they are handed are left out."""
    for (file, _, name), (_, _, _, cumulative, _) in stats.stats.items():  # type: ignore[attr-defined]
        path = Path(file)
        if path.is_relative_to(PACKAGE) and name.isidentifier():
            floor, *room = path.relative_to(PACKAGE).with_suffix("").parts
            if room and floor not in ("papers", "evidence"):
                yield ".".join([floor, *room, name]), cumulative


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
