"""The process in which one experiment runs: reads its job from standard input, reports on standard output.

Whatever the experiment itself prints goes to the log, since the log is this process's standard error and standard
output is moved onto it. When standard input closes, the parent has gone, and so goes this process.
"""

import json
import os
import platform
import resource
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import psutil

from locally import catalogue
from locally.errors import UsageError
from locally.evidence import Run, Scale, Status

ITEMS = "items"  # folder of finished items of a full-size study
REPORTED = ("locally", "torch", "numpy", "scipy", "scikit-learn", "numba", "matplotlib")


@dataclass(frozen=True)
class Job:
    """One experiment to run. Limits are enforced from outside, by the runner."""

    slug: str
    scale: Scale
    seeds: tuple[int, ...]
    device: str = "cpu"
    data: str = ""  # folder with the user's data sets, "" for none
    time_limit: float = 0.0  # seconds, 0 for the scale's own
    memory_limit: float = 0.0  # MiB, 0 for most of the machine's
    threads: int = 1
    nice: int = 0  # how far it stands back where others want the processor too

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        data = json.loads(text)
        return cls(**data | {"scale": Scale(data["scale"]), "seeds": tuple(data["seeds"])})


def main() -> None:
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job = Job.from_json(sys.stdin.readline())
    os.nice(job.nice)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    folder = Path.cwd()

    last = 0.0

    def progress(fraction: float, label: str) -> None:
        nonlocal last
        now = time.monotonic()
        if fraction >= 1 or now - last > 0.1:
            last = now
            print(json.dumps({"fraction": fraction, "label": label}), file=reports)

    run = Run(
        scale=job.scale,
        seeds=job.seeds,
        device=job.device,
        scratch=folder,
        data=Path(job.data) if job.data else None,
        keep=folder / ITEMS if job.scale is Scale.PAPER else None,
        on_progress=progress,
    )
    error, status = "", Status.FINISHED
    start = time.perf_counter()
    try:
        paper = catalogue.find(catalogue.load(), job.slug)
        catalogue.experiment(paper)(run)
    except UsageError as problem:
        error, status = str(problem), Status.REFUSED
    except MemoryError as problem:
        error, status = f"MemoryError: {problem}", Status.OUT_OF_MEMORY
        traceback.print_exc()
    except Exception as problem:
        error, status = f"{type(problem).__name__}: {problem}", Status.CRASHED
        traceback.print_exc()
    result = {
        "measures": [m.to_dict() for m in run.measures],
        "error": error,
        "status": str(status),
        "seconds": time.perf_counter() - start,
        "peak_memory_mib": peak_memory_mib(),
        "versions": versions(),
        "machine": machine(),
        "figures": [{"name": f.name, "caption": f.caption, "svg": f.svg} for f in run.figures],
    }
    for i, figure in enumerate(run.figures):
        (folder / f"figure-{i}.pdf").write_bytes(figure.pdf)
        (folder / f"figure-{i}.png").write_bytes(figure.png)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    print(json.dumps({"done": True}), file=reports)


def peak_memory_mib() -> float:
    """High-water mark of this process alone; getrusage would carry over the parent's on Linux."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:  # no /proc on this system
        pass
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in REPORTED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=True) or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # likewise
        pass
    return platform.processor() or platform.machine()


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
