"""Runs experiments, each in a process of its own, under limits of time and memory.

`execute` runs one job to its end and always comes back with evidence: a crash, a hang, a kill or a full disk in the
experiment is a status, not an exception. `run_jobs` keeps several going at once and yields each as it ends.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import psutil
from filelock import FileLock, Timeout

import locally
from locally.evidence import Claim, Evidence, Figure, Measure, Outcome, Scale, Status, Verdict, judge
from locally.evidence.elsewhere import THREAD_VARIABLES
from locally.home import home
from locally.page.worker import ITEMS, Job

TIME_LIMITS = {Scale.QUICK: 120.0, Scale.DEFAULT: 600.0, Scale.PAPER: 7 * 86400.0}  # seconds
SEEDS = {Scale.QUICK: 3, Scale.DEFAULT: 5, Scale.PAPER: 10}
MEMORY_SHARE = 0.8  # of the machine, where no limit is given
POLL = 0.1  # seconds
WEIGHING = 0.01  # share of a processor that watching the memory may take: it means a look at every process there is
RARELY = 1.0  # seconds that it may wait for that
LOG_LIMIT = 200_000  # characters kept, from the end
LOG_TAIL = 4_000  # bytes shown while a run goes on
SPENT, NOTING = "seconds", 5.0  # file that says how long all attempts at a study have taken, and its seconds' age
FINISHED = "finished"  # file that says that nothing of an experiment's folder is needed any more


@dataclass(frozen=True)
class Progress:
    """`fraction` in [0, 1] of the job's work, and what it is doing."""

    slug: str
    fraction: float
    label: str


def execute(
    job: Job,
    claims: Sequence[Claim],
    on_progress: Callable[[Progress], None] = lambda _: None,
    stop: threading.Event | None = None,
    on_log: Callable[[str], None] | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Evidence:
    """Run one job in a fresh process and wait for it; `stop` ends it early with status *cancelled*.

    `on_log` is called with the end of what the experiment has printed whenever there is more of it. `variables` are
    added to its environment.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    begin, earlier = time.monotonic(), 0.0
    status, peak, result, log = Status.CRASHED, 0.0, dict[str, Any](), ""
    figures: tuple[Figure, ...] = ()
    try:
        with working_folder(job) as folder:
            earlier = _read_seconds(folder)
            kept = partial(_keep_seconds, folder, earlier, begin) if job.scale is Scale.PAPER else (lambda: None)
            stop = stop or threading.Event()
            status, peak, code = _run_worker(job, folder, on_progress, stop, on_log, variables, kept)
            log = (folder / "log").read_text(encoding="utf-8", errors="replace")[-LOG_LIMIT:]
            result, reason = _read_result(folder, log)
            figures = _figures(folder, result)
            if status is Status.FINISHED and result and not result["error"]:
                (folder / FINISHED).touch()
        if status is Status.FINISHED and not result:
            status, reason = Status.CRASHED, reason or _how_it_died(code)
        elif status is Status.FINISHED and result["error"]:
            status, reason = Status(result["status"]), result["error"]
        elif status is not Status.FINISHED:
            reason = _why_stopped(status, job)
    except OSError as error:
        status, reason = Status.CRASHED, f"{type(error).__name__}: {error}"

    measures = tuple(Measure.from_dict(m) for m in result.get("measures", ()))
    finished = status is Status.FINISHED
    verdict = judge(claims, measures, job.scale) if finished else Verdict(Outcome.INCONCLUSIVE, reason)
    return Evidence(
        slug=job.slug,
        scale=job.scale,
        status=status,
        verdict=verdict,
        measures=measures,
        seeds=job.seeds,
        started=started,
        seconds=earlier + time.monotonic() - begin,
        peak_memory_mib=max(peak, result.get("peak_memory_mib", 0.0)),
        device=job.device,
        figures=figures,
        versions=result.get("versions", {}),
        code_version=code_version(),
        git_revision=git_revision(),
        machine=result.get("machine", {}),
        log=log,
    )


def run_jobs(
    jobs: Sequence[tuple[Job, Sequence[Claim]]],
    *,
    at_once: int = 1,
    on_progress: Callable[[Progress], None] = lambda _: None,
    interrupted: threading.Event | None = None,
) -> Generator[Evidence]:
    """Run all jobs, `at_once` at a time with the cores shared out among them, and yield each as it ends.

    Leaving the iterator early stops what runs and starts nothing more.

    Raises:
        KeyboardInterrupt: `interrupted` was set.
    """
    stop = threading.Event()
    threads = max(1, (os.cpu_count() or 1) // at_once)
    pool = ThreadPoolExecutor(max_workers=at_once)
    try:
        pending: set[Future[Evidence]] = {
            pool.submit(execute, replace(job, threads=threads), claims, on_progress, stop) for job, claims in jobs
        }
        while pending:
            if interrupted is not None and interrupted.is_set():
                raise KeyboardInterrupt
            # a short wait, so that Ctrl-C is seen at once
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def working_folder(job: Job) -> Iterator[Path]:
    """Where an experiment works, thrown away after it; that of a full-size study stays until the study has finished.

    What the study keeps there, checkpoints and finished items, is found again by the next attempt at the same job with
    the same code. Leftovers of other code are removed then.
    """
    with contextlib.ExitStack() as stack:
        folder = _lasting_folder(job, stack) if job.scale is Scale.PAPER else None
        if folder is None:
            fleeting = tempfile.TemporaryDirectory(prefix="locally-", ignore_cleanup_errors=True)
            yield Path(stack.enter_context(fleeting))
            return
        yield folder
        if (folder / FINISHED).exists():
            shutil.rmtree(folder, ignore_errors=True)


def study_folder(job: Job) -> Path:
    """Where a full-size study works; what an earlier attempt of the same code has finished is under it."""
    place, name = _study(job)
    return place / f"{name}-{_digest(code_version())}"


def items_kept(job: Job) -> int:
    """Finished items of an earlier attempt at a full-size study, which the next one does not repeat."""
    return sum(1 for _ in (study_folder(job) / ITEMS).glob("*.item"))


def _study(job: Job) -> tuple[Path, str]:
    same_result = replace(job, threads=1, time_limit=0.0, memory_limit=0.0, nice=0).to_json()
    return home() / "unfinished", f"{job.slug}-{_digest(same_result)}"


def _lasting_folder(job: Job, stack: contextlib.ExitStack) -> Path | None:
    """None while another process is at the same study."""
    place, name = _study(job)
    place.mkdir(exist_ok=True)
    try:
        stack.enter_context(FileLock(place / f"{name}.lock", timeout=0))
    except Timeout:
        return None
    folder = study_folder(job)
    for leftover in place.glob(f"{name}-*"):
        if leftover != folder:
            shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    return folder


def _read_seconds(folder: Path) -> float:
    """What earlier attempts at the study in this folder have taken."""
    try:
        return float((folder / SPENT).read_text())
    except (OSError, ValueError):
        return 0.0


def _keep_seconds(folder: Path, earlier: float, begin: float) -> None:
    """Where a kill leaves it for the next attempt; a look at the file's age is cheap, writing waits a while."""
    file, now = folder / SPENT, time.time()
    if not file.exists() or now - file.stat().st_mtime > NOTING:
        file.write_text(f"{earlier + time.monotonic() - begin}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _run_worker(
    job: Job,
    folder: Path,
    on_progress: Callable[[Progress], None],
    stop: threading.Event,
    on_log: Callable[[str], None] | None,
    variables: Mapping[str, str],
    keep_seconds: Callable[[], None],
) -> tuple[Status, float, int]:
    """How the process ended by our own hand (FINISHED when it ended by itself), peak memory in MiB, exit code."""
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "locally.page.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=folder,
            env={**_environment(job.threads), **variables},
            start_new_session=True,
        )
    show_log = (lambda: None) if on_log is None else _new_lines(folder / "log", on_log)

    def look() -> None:
        show_log()
        keep_seconds()

    status, peak = _watch(process, job, on_progress, stop, look)
    return status, peak, process.returncode


def _watch(
    process: "subprocess.Popen[bytes]",
    job: Job,
    on_progress: Callable[[Progress], None],
    stop: threading.Event,
    look: Callable[[], None],
) -> tuple[Status, float]:
    """Feed the job in, pass its progress on, and enforce the limits until it ends."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(job.to_json().encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it died at start-up; the log says why
    reader = threading.Thread(target=_read_progress, args=(process.stdout, job.slug, on_progress), daemon=True)
    reader.start()

    deadline = time.monotonic() + time_limit(job)
    peak, status, weigh_at = 0.0, Status.FINISHED, 0.0
    while process.poll() is None:
        if time.monotonic() >= weigh_at:
            spent = time.thread_time()
            peak = max(peak, resident_mib(process.pid))
            weigh_at = time.monotonic() + min((time.thread_time() - spent) / WEIGHING, RARELY)
        if stop.is_set():
            status = Status.CANCELLED
        elif time.monotonic() > deadline:
            status = Status.TIMED_OUT
        elif peak > memory_limit(job):
            status = Status.OUT_OF_MEMORY
        if status is not Status.FINISHED:
            break
        look()
        time.sleep(POLL)
    _end(process)
    look()
    reader.join(timeout=5)
    process.stdin.close()
    return status, peak


def _new_lines(path: Path, on_log: Callable[[str], None]) -> Callable[[], None]:
    """What to call from time to time: hands on the end of the log when it has grown."""
    seen = 0

    def show() -> None:
        nonlocal seen
        size = path.stat().st_size
        if size > seen:
            seen = size
            with path.open("rb") as log:
                log.seek(max(0, size - LOG_TAIL))
                on_log(log.read().decode("utf-8", errors="replace"))

    return show


def _read_progress(stream: IO[bytes], slug: str, on_progress: Callable[[Progress], None]) -> None:
    with stream:
        for line in stream:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut short
            if "fraction" in event:
                on_progress(Progress(slug, event["fraction"], event["label"]))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the experiment and every process that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def resident_mib(pid: int) -> float:
    """Resident memory of a process and its descendants."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0.0
    total = 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.Error:
            continue
    return total / 2**20


def _environment(threads: int) -> dict[str, str]:
    # threads that spin while they wait make small kernels several times slower on a machine that does anything else
    habits = {"OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1", "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}
    return os.environ | habits | dict.fromkeys(THREAD_VARIABLES, str(threads))


def time_limit(job: Job) -> float:
    """In seconds."""
    return job.time_limit or TIME_LIMITS[job.scale]


def memory_limit(job: Job) -> float:
    """In MiB."""
    return job.memory_limit or MEMORY_SHARE * psutil.virtual_memory().total / 2**20


def _read_result(folder: Path, log: str) -> tuple[dict[str, Any], str]:
    """What the worker wrote, or why there is nothing."""
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf-8")), ""
    except FileNotFoundError:
        lines = [line for line in log.splitlines() if line.strip()]
        return {}, lines[-1] if lines and "Error" in lines[-1] else ""
    except ValueError:
        return {}, "its result was cut short: is the disk full?"


def _why_stopped(status: Status, job: Job) -> str:
    return {
        Status.TIMED_OUT: f"stopped at its time limit of {time_limit(job):g} s",
        Status.OUT_OF_MEMORY: f"stopped at its memory limit of {memory_limit(job):.0f} MiB",
    }.get(status, "stopped before its end")


def _how_it_died(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", perhaps by the system for want of memory" if name == "SIGKILL" else "")
    return f"left with exit status {code} before its end"


def _figures(folder: Path, result: dict[str, Any]) -> tuple[Figure, ...]:
    return tuple(
        Figure(
            f["name"],
            f["caption"],
            f["svg"],
            (folder / f"figure-{i}.pdf").read_bytes(),
            (folder / f"figure-{i}.png").read_bytes(),
        )
        for i, f in enumerate(result.get("figures", ()))
    )


@cache
def code_version() -> str:
    """Fingerprint of the package's source and cards: what `--resume` compares."""
    digest = hashlib.sha256()
    root = Path(locally.__file__).parent
    for file in sorted([*root.rglob("*.py"), *root.rglob("*.toml")]):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return f"{locally.__version__}+{digest.hexdigest()[:12]}"


@cache
def git_revision() -> str:
    """Revision of the checkout that the package runs from, "-dirty" when changed, "" outside one."""
    root = Path(locally.__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an installed copy inside some other checkout is not ours
        return git("rev-parse", "HEAD").strip() + ("-dirty" if git("status", "--porcelain", ".").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
