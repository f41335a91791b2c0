"""What is known of a study before it starts: time, memory, disk, data, and what an earlier attempt has left."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from locally.evidence import Evidence, Paper, Scale
from locally.evidence.estimates import Estimate, Range, estimate
from locally.home import home
from locally.page.data_files import missing
from locally.page.progress import duration
from locally.page.runner import items_kept, memory_limit, study_folder, time_limit
from locally.page.worker import Job, machine

ROWS = 1024  # of the matrices whose product is timed
LONG_ENOUGH = 0.3  # seconds


@dataclass(frozen=True)
class Outlook:
    """One study's.

    Attributes:
        estimate: None where nothing stored tells, for the reason in `unknown`.
        here: whether it will run on this machine, of which the rest speaks, or on a cluster.
        free_mib, limit_mib: memory that is free now, and at which the runner ends the study.
        disk_gib, free_gib: what the study keeps until it is finished, and what is free where it does.
        items: finished by an earlier attempt, from which this one goes on; `attempted` also without any.
        missing: files that it reads and that are not there, with what they are.
    """

    job: Job
    estimate: Estimate | None
    unknown: str
    here: bool
    free_mib: float
    limit_mib: float
    disk_gib: float
    free_gib: float
    folder: Path
    items: int
    attempted: bool
    missing: tuple[tuple[str, str], ...]

    @property
    def too_large(self) -> str:
        """Why it should not start here; "" where it may. GPUs have a memory of their own, which nobody knows before."""
        if self.estimate is None or not self.here or self.job.device != "cpu":
            return ""
        least = self.estimate.memory_mib.low
        if least <= self.limit_mib:
            return ""
        return (
            f"{self.job.slug} takes {_gib(least)} GiB of memory at least ({self.estimate.basis}), "
            f"and {_gib(self.limit_mib)} GiB is the limit here"
        )

    def lines(self) -> list[str]:
        """As a person reads it."""
        job = self.job
        said = [f"{job.slug}, {job.scale} scale, {len(job.seeds)} seeds on {job.device}"]
        if self.estimate is None:
            said.append(f"time and memory: unknown: {self.unknown}")
        else:
            seconds, memory = self.estimate.seconds, self.estimate.memory_mib
            said.append(f"time: {in_words(seconds, duration)} ({self.estimate.basis})")
            free = f"; {_gib(self.free_mib)} GiB are free, {_gib(self.limit_mib)} GiB the limit" if self.here else ""
            said.append(f"memory: {in_words(memory, lambda mib: f'{_gib(mib)} GiB')}{free}")
            if self.too_large:
                said.append("it will not fit into memory: it starts with --anyway alone")
            if seconds.high > time_limit(job):
                said.append(f"it is stopped after {duration(time_limit(job))}: --time-limit says otherwise")
        if self.disk_gib:
            free = f"; {self.free_gib:,.0f} GiB are free in {self.folder.parent}" if self.here else ""
            said.append(f"disk: about {self.disk_gib:,.0f} GiB until it is finished{free}")
        if self.missing:
            where = f"not in {job.data}" if job.data else "name their folder with --data"
            files = "; ".join(f"{path} ({what})" for path, what in self.missing)
            said.append(f"data: {where}: {files}")
        if self.attempted:
            said.append(f"goes on where an earlier attempt was stopped, with {self.items} finished items")
        return [said[0], *(f"  {line}" for line in said[1:])]

    def to_dict(self) -> dict[str, Any]:
        """As a program reads it; numbers in seconds, MiB and GiB."""
        known = self.estimate is not None
        return {
            "slug": self.job.slug,
            "scale": str(self.job.scale),
            "seeds": list(self.job.seeds),
            "device": self.job.device,
            "seconds": asdict(self.estimate.seconds) if self.estimate else None,
            "memory_mib": asdict(self.estimate.memory_mib) if self.estimate else None,
            "basis": self.estimate.basis if self.estimate else "",
            "unknown": "" if known else self.unknown,
            "free_memory_mib": round(self.free_mib, 1) if self.here else None,
            "memory_limit_mib": round(self.limit_mib, 1) if self.here else None,
            "disk_gib": self.disk_gib,
            "free_disk_gib": round(self.free_gib, 1) if self.here else None,
            "items_kept": self.items,
            "missing_data": [path for path, _ in self.missing],
        }


def look_ahead(
    paper: Paper, job: Job, stored: Sequence[Evidence], *, here: bool = True, rate: Callable[[], float] | None = None
) -> Outlook:
    """What `job` will take, from the runs of its paper that are stored, oldest first.

    Args:
        here: False for a cluster, whose workers are taken to be like this machine.
        rate: floating-point operations a second; measured by default, where the card asks for it.
    """
    assert paper.experiment is not None
    found = estimate(
        paper.work,
        stored,
        scale=job.scale,
        seeds=len(job.seeds),
        device=job.device,
        machine=machine(),
        rate=rate or (lambda: product_rate(job.device)),
    )
    folder, full = study_folder(job), job.scale is Scale.PAPER
    return Outlook(
        job=job,
        estimate=found,
        unknown="" if found else _why_unknown(paper, stored),
        here=here,
        free_mib=psutil.virtual_memory().available / 2**20,
        limit_mib=memory_limit(job),
        disk_gib=paper.work.disk if paper.work and full else 0.0,
        free_gib=shutil.disk_usage(home()).free / 2**30,
        folder=folder,
        items=items_kept(job) if here else 0,
        attempted=here and job.scale is Scale.PAPER and folder.exists(),
        missing=tuple(missing(paper.experiment, Path(job.data) if job.data else None))
        if job.scale is Scale.PAPER
        else (),
    )


def together(outlooks: Sequence[Outlook]) -> str:
    """All of them, one after another."""
    known = [o.estimate.seconds for o in outlooks if o.estimate]
    if not known:
        return f"{len(outlooks)} studies: nothing is known of their time"
    seconds = sum(known[1:], known[0])
    rest = f", without {len(outlooks) - len(known)} of which nothing is known" if len(known) < len(outlooks) else ""
    return f"{len(outlooks)} studies one after another: {in_words(seconds, duration)}{rest}"


def in_words(figures: Range, unit: Callable[[float], str]) -> str:
    """
    >>> in_words(Range(7200, 1800, 28800), duration)
    'about 2 h, between 30 min and 8 h'
    """
    return f"about {unit(figures.likely)}, between {unit(figures.low)} and {unit(figures.high)}"


def _why_unknown(paper: Paper, stored: Sequence[Evidence]) -> str:
    if paper.work is None:
        return f"no run at this scale is stored, and the card of {paper.slug} says nothing of its size"
    return "the study has never finished" if stored else "no run is stored"


def _gib(mib: float) -> str:
    return f"{mib / 1024:,.1f}" if mib < 10_240 else f"{mib / 1024:,.0f}"


@cache
def product_rate(device: str) -> float:
    """Floating-point operations a second of a product of matrices in single precision."""
    import torch

    a = torch.ones(ROWS, ROWS, device=device)
    product = a @ a
    float(product[0, 0])  # waits until the device is done
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < LONG_ENOUGH:
        for _ in range(5):
            torch.mm(a, a, out=product)
        float(product[0, 0])
        done += 5
    return done * 2 * math.pow(ROWS, 3) / (time.perf_counter() - began)
