"""One run of an experiment: what it is handed, and everything that it leaves behind."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from locally.errors import UsageError
from locally.evidence import elsewhere
from locally.evidence.claims import Measure, Scale, Status, Verdict
from locally.evidence.kept import Kept

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Figure:
    """A plot as the report shows it (SVG) and as a paper or a slide takes it (PDF, PNG)."""

    name: str
    caption: str
    svg: str
    pdf: bytes = b""
    png: bytes = b""


@dataclass(frozen=True)
class Evidence:
    """Everything that one run of one paper's experiment left behind."""

    slug: str
    scale: Scale
    status: Status
    verdict: Verdict
    measures: tuple[Measure, ...]
    seeds: tuple[int, ...]
    started: str  # ISO 8601, UTC
    seconds: float  # by the clock, all attempts together where a study was taken up again
    peak_memory_mib: float
    device: str = "cpu"
    figures: tuple[Figure, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    code_version: str = ""
    git_revision: str = ""
    machine: Mapping[str, str | int | float] = field(default_factory=dict)
    log: str = ""

    @property
    def label(self) -> str:
        """The badge: the verdict of a finished run, otherwise how the run ended."""
        return str(self.verdict.outcome if self.status is Status.FINISHED else self.status)

    @property
    def command(self) -> str:
        """What makes the same figures again."""
        device = "" if self.device == "cpu" else f" --device {self.device}"
        return f"locally run {self.slug} --scale {self.scale} --seeds {len(self.seeds)}{device}"

    def to_dict(self) -> dict[str, Any]:
        """The object that `locally run --json` prints."""
        deciding = self.verdict.deciding
        return {
            "slug": self.slug,
            "scale": str(self.scale),
            "status": str(self.status),
            "verdict": str(self.verdict.outcome),
            "reason": self.verdict.reason,
            "claim": deciding.to_dict() if deciding else {},
            "claims": [f.to_dict() for f in self.verdict.findings],
            "measures": [m.to_dict() for m in self.measures],
            "seeds": list(self.seeds),
            "device": self.device,
            "started": self.started,
            "seconds": round(self.seconds, 3),
            "peak_memory_mib": round(self.peak_memory_mib, 1),
            "versions": dict(self.versions),
            "code_version": self.code_version,
            "git_revision": self.git_revision,
            "machine": dict(self.machine),
        }


class MissingData(UsageError):
    """A full-size study needs files that only the user has."""


class Run:
    """What an experiment is handed: scale, seeds, device, a scratch folder, progress, and `record`.

    Args:
        scale: what `pick` chooses by.
        seeds: distinct, at least one.
        device: a torch device name; experiments place their tensors there.
        scratch: a folder that is thrown away after the run.
        data: folder with the user's own data sets, for studies that need them.
        keep: a folder of this run's own that outlives a kill: finished items of `parallel` are found there again.
        on_progress: called with (fraction done in [0, 1], label).
    """

    def __init__(
        self,
        *,
        scale: Scale | str = Scale.QUICK,
        seeds: Sequence[int] = (0, 1, 2),
        device: str = "cpu",
        scratch: Path | None = None,
        data: Path | None = None,
        keep: Path | None = None,
        on_progress: Callable[[float, str], None] | None = None,
    ) -> None:
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds must be distinct and at least one, got {list(seeds)}")
        self.scale = Scale(scale)
        self.seeds = tuple(seeds)
        self.device = device
        self.scratch = scratch or Path.cwd()
        self.data_folder = data
        self.measures: list[Measure] = []
        self.figures: list[Figure] = []
        self._keep, self._calls = keep, 0
        self._on_progress = on_progress
        self._levels: list[tuple[int, int]] = []  # (done, total) of each open `track`, outermost first

    def pick(self, *, quick: T, default: T, paper: T) -> T:
        """The one of the three that goes with this run's scale."""
        return {Scale.QUICK: quick, Scale.DEFAULT: default, Scale.PAPER: paper}[self.scale]

    def data(self, relative: str, what: str) -> Path:
        """The user's file `relative` under the data folder; `what` says in words what it is, for the message."""
        if self.data_folder is None:
            raise MissingData(f"this scale reads {relative} ({what}): name the folder that holds it with --data DIR")
        path = self.data_folder / relative
        if not path.exists():
            raise MissingData(f"{path} does not exist: this scale reads {what} there")
        return path

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Iterate and report progress; nested tracks refine the fraction of the outer one."""
        if total is None:
            if not isinstance(items, Sized):
                raise TypeError(f"track({label!r}) needs total= for an iterable without a length")
            total = len(items)
        self._levels.append((0, max(total, 1)))
        depth = len(self._levels)
        try:
            for done, item in enumerate(items):
                self._levels[depth - 1] = (done, max(total, 1))
                self._report(label)
                yield item
            self._levels[depth - 1] = (max(total, 1), max(total, 1))
            self._report(label)
        finally:
            del self._levels[depth - 1 :]

    def parallel(self, function: Callable[["Run", T], R], items: Sequence[T], label: str) -> list[R]:
        """`[function(part, item) for item in items]` over the cores or the cluster that this run may use.

        For independent items whose work is too small for threads: one process an item, one thread a process. Each call
        has a run of its own, which holds only what that call recorded; all of it is kept here, in the items' order
        whoever is done first, so that the result is the same on one core. `function` stands at the top of a module, and
        what it returns can be pickled; what it writes to its scratch folder stays there, which may be on another
        machine. No process is started on a GPU, where there is one core, and for a paper in a folder of its own, whose
        module no other process could import.
        """
        kept = Kept(self._keep, self._calls)
        self._calls += 1
        answers: dict[int, tuple[Run, R]] = dict(kept.found(len(items)))
        left = {i: item for i, item in enumerate(items) if i not in answers}
        place = self._place(function, len(left))
        done = self._in_turn if place is None else partial(self._side_by_side, *place)
        for index, answer in done(function, left, label):
            answers[index] = answer
            kept.put(index, answer)
        for index in range(len(items)):
            self.measures.extend(answers[index][0].measures)
            self.figures.extend(answers[index][0].figures)
        return [answers[index][1] for index in range(len(items))]

    def _part(self) -> "Run":
        return Run(scale=self.scale, seeds=self.seeds, device=self.device, scratch=self.scratch, data=self.data_folder)

    def _in_turn(
        self, function: Callable[["Run", T], R], items: Mapping[int, T], label: str
    ) -> Iterator[tuple[int, tuple["Run", R]]]:
        for index, item in self.track(items.items(), label):
            part = self._part()
            part._on_progress, part._levels = self._on_progress, self._levels
            result = function(part, item)
            part._on_progress, part._levels = None, []
            yield index, (part, result)

    def _place(self, function: Callable[..., Any], items: int) -> tuple[Any, Callable[..., bytes]] | None:
        """Where items go side by side and how one is asked for there; None for here, one after another."""
        importable = getattr(function, "func", function).__module__ in sys.modules
        if self.device != "cpu" or not importable or items < 2:
            return None
        if address := os.environ.get(elsewhere.CLUSTER):
            return elsewhere.on_cluster(address), elsewhere.answer_apart
        processes = min(cores(), items)
        return (elsewhere.on_cores(processes), elsewhere.answer) if processes > 1 else None

    def _side_by_side(
        self,
        place: Any,
        ask: Callable[..., bytes],
        function: Callable[["Run", T], R],
        items: Mapping[int, T],
        label: str,
    ) -> Iterator[tuple[int, tuple["Run", R]]]:
        import pickle
        from concurrent.futures import as_completed

        with place as pool:
            futures = {pool.submit(ask, self._part(), function, item): index for index, item in items.items()}
            for future in self.track(as_completed(futures), label, len(futures)):
                yield futures[future], pickle.loads(future.result())  # made by `answer`, never read from outside

    def _report(self, label: str) -> None:
        if self._on_progress is None:
            return
        fraction, width = 0.0, 1.0
        for done, total in self._levels:
            fraction += width * min(done, total) / total
            width /= total
        self._on_progress(min(fraction, 1.0), label)

    def record(
        self, method: str, metric: str, value: float, *, seed: int | None = None, **setting: str | int | float | bool
    ) -> None:
        """Record one number. Anything that float() takes; leave `seed` out of what does not depend on it."""
        plain = {k: v.item() if hasattr(v, "item") else v for k, v in setting.items()}
        self.measures.append(Measure(method, metric, float(value), None if seed is None else int(seed), plain))

    def figure(self, figure: "MatplotlibFigure", name: str, caption: str = "") -> None:
        """Keep a Matplotlib figure; `name` must be unique within the run."""
        from locally.plots import freeze

        if any(f.name == name for f in self.figures):
            raise ValueError(f"a figure named {name!r} is there already")
        self.figures.append(Figure(name, caption, *freeze(figure, salt=name)))

    def plot_lines(self, x: str, y: str, *, log: bool = False, name: str = "", caption: str = "", **style: Any) -> None:
        """Metric `y` over setting `x`, one line a method, band from the lowest to the highest seed."""
        from locally.evidence.drawings import lines

        self.figure(lines(self.measures, x, y, log=log, **style), name or f"{y} over {x}", caption)

    def plot_bars(self, metric: str, *, log: bool = False, name: str = "", caption: str = "", **style: Any) -> None:
        """`metric` per method, a dot for each seed."""
        from locally.evidence.drawings import bars

        self.figure(bars(self.measures, metric, log=log, **style), name or metric, caption)


def cores() -> int:
    """How many this process was given; the runner says so by the variable that OpenMP reads. One where nobody did."""
    return int(os.environ.get("OMP_NUM_THREADS", "1"))
