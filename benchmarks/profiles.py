"""Where the slowest experiments spend their time: one seed of each in this process, on one core.

python -m benchmarks.profiles [COUNT]    the slowest by their stored runs at default scale; ten by default

Prints a table and writes it to `docs/profiles.md`. A function's share is its own time and that of the libraries that it
calls, not that of other functions of ours.
"""

import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

from docs.markdown import table
from docs.records import runs
from locally import catalogue
from locally.evidence import Run, Scale

WRITTEN = Path(__file__).parent.parent / "docs" / "profiles.md"
PACKAGE = Path(catalogue.__file__).parent
SHOWN = 4  # functions of each
EVERY = 0.005  # seconds between looks
LEAST = 0.05  # share that is worth a line
HEAD = (
    "# Profiles of the slowest experiments\n\n"
    "One seed at default scale in one process on one core, by `python -m benchmarks.profiles`. The work of libraries "
    "counts for the function of ours that calls them; what other functions of ours do does not.\n\n"
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
    """Seconds, and the functions that take the largest shares of them."""
    spent: dict[str, float] = defaultdict(float)
    last = began = time.perf_counter()

    def look(_: int, frame: FrameType | None) -> None:
        """Python hands over a signal when a call of a library has ended: all that passed since the last one counts."""
        nonlocal last
        now = time.perf_counter()
        spent[at_work(frame)] += now - last
        last = now

    with tempfile.TemporaryDirectory() as scratch:
        run = Run(scale=Scale.DEFAULT, seeds=(0,), device="cpu", scratch=Path(scratch))
        signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, EVERY, EVERY)
        try:
            experiment(run)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.perf_counter() - began
    most = sorted(spent.items(), key=lambda item: -item[1])[:SHOWN]
    return seconds, [(name, s / seconds) for name, s in most if s >= LEAST * seconds]


def at_work(frame: FrameType | None) -> str:
    """The innermost function of ours, the spine apart, with its room."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and (place := path.relative_to(PACKAGE)).parts[0] != "evidence":
            return ".".join([*place.with_suffix("").parts, frame.f_code.co_qualname.replace("<locals>.", "")])
        frame = frame.f_back
    return "the runner"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
