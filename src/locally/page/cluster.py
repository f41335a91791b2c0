"""Experiments on a Dask cluster: the runner's own code on other machines, results handed back once.

A worker that is lost loses nothing but time: its experiments start again elsewhere, and again on the scheduler that
comes back after a restart. Seeds that an experiment runs side by side go to the cluster's other workers. Every worker
needs the same version of this package, and the data folder under the same path.
"""

import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self

from locally.errors import UsageError, require
from locally.evidence import Claim, Evidence, Outcome, Status, Verdict
from locally.evidence.elsewhere import CLUSTER, still_wanted
from locally.page.runner import Progress, code_version, execute
from locally.page.worker import Job

EXPERIMENT, GPU, MEMORY = "EXPERIMENT", "GPU", "MEMORY"  # resources that workers may offer; memory in MiB
TOPIC = "locally-progress"
POLL = 0.2  # seconds between looks at what is done
GREETING = 10.0  # seconds for a first answer of the scheduler
PATIENCE = 600.0  # seconds to wait for a scheduler that has gone
ATTEMPTS = 4  # of one experiment, when workers are lost under it


@dataclass(frozen=True)
class Work:
    """An experiment on its way: how often it has been sent, and what will bring its evidence."""

    job: Job
    claims: Sequence[Claim]
    sent: int
    future: Any


class Cluster:
    """A Dask cluster that runs experiments.

    Args:
        where: tcp://host:port or tls://host:port of a scheduler, the path of its scheduler file, or local:N for N
            workers on this machine.
        say: told in words what happens to the connection.
        patience: seconds to wait for a scheduler that has gone before giving up.

    Raises:
        UsageError: `where` is none of these, or nothing answers there.
        MissingExtra: Dask is not installed.
    """

    def __init__(self, where: str, *, say: Callable[[str], None], patience: float = PATIENCE) -> None:
        self.where, self.say, self.patience = where, say, patience
        self._distributed = require("distributed", "cluster")
        self._own: Any = None
        self._client: Any = None
        self._on_progress: Callable[[Progress], None] = lambda _: None

    def __enter__(self) -> Self:
        kind, _, count = self.where.partition(":")
        if kind == "local":
            if not count.isdigit() or int(count) < 1:
                raise UsageError(f"--cluster local:N needs a number of workers, got {self.where!r}")
            self._own = self._distributed.LocalCluster(
                n_workers=int(count), threads_per_worker=1, resources={EXPERIMENT: 1}, dashboard_address=None
            )
        self._connect()
        return self

    def __exit__(self, *_: object) -> None:
        for open_one in (self._client, self._own):
            if open_one is not None:
                open_one.close()

    def run(
        self,
        jobs: Sequence[tuple[Job, Sequence[Claim]]],
        on_progress: Callable[[Progress], None] = lambda _: None,
        interrupted: Event | None = None,
    ) -> Generator[Evidence]:
        """Run all jobs and yield the evidence of each once, as it ends.

        Leaving the iterator early stops what runs on the cluster.

        Raises:
            KeyboardInterrupt: `interrupted` was set.
        """
        self._on_progress = on_progress
        under_way = [self._send(job, claims) for job, claims in jobs]
        try:
            while under_way:
                if interrupted is not None and interrupted.is_set():
                    raise KeyboardInterrupt
                ended = next((w for w in under_way if w.future.status != "pending"), None)
                if ended is None:
                    time.sleep(POLL)
                    continue
                under_way.remove(ended)
                evidence = self._collect(ended)
                if evidence is not None:
                    yield evidence
                elif ended.sent < ATTEMPTS:
                    self._reconnect()
                    under_way.append(self._send(ended.job, ended.claims, ended.sent + 1))
                else:
                    yield _given_up(ended.job, f"lost {ended.sent} times with its worker or scheduler")
        finally:
            for left in under_way:
                left.future.cancel()

    def _collect(self, work: Work) -> Evidence | None:
        """The evidence of a future that is done; None when it was lost on the way."""
        distributed = self._distributed
        if work.future.status in ("cancelled", "lost"):
            return None
        try:
            return work.future.result(timeout=GREETING)
        except distributed.KilledWorker as error:
            return _given_up(work.job, f"ended {ATTEMPTS} workers, the last of them {error.last_worker.address}")
        except UsageError:
            raise
        except (OSError, distributed.TimeoutError, distributed.client.FutureCancelledError) as error:
            self.say(f"{work.job.slug}: its result was lost ({type(error).__name__}); it runs again")
            return None

    def _send(self, job: Job, claims: Sequence[Claim], attempt: int = 1) -> Work:
        future = self._client.submit(
            execute_remote,
            job,
            tuple(claims),
            code_version(),
            pure=False,
            retries=ATTEMPTS,
            resources=self._needs(job),
            key=f"{job.slug}-{job.scale}-{time.time_ns()}",
        )
        return Work(job, claims, attempt, future)

    def _needs(self, job: Job) -> dict[str, float]:
        """Resources of one job; what no worker offers is not asked for, save a GPU, without which it cannot run."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        offered = {name for worker in workers for name in worker["resources"]}
        wanted: dict[str, float] = {EXPERIMENT: 1}
        if job.memory_limit:
            wanted[MEMORY] = job.memory_limit
        needs = {name: amount for name, amount in wanted.items() if name in offered}
        if not job.device.startswith("cuda"):
            return needs
        if workers and GPU not in offered:
            raise UsageError(f"no worker at {self.where} offers a {GPU}: start one with --resources '{GPU}=1'")
        return needs | {GPU: 1}

    # The connection ----------------------------------------------------------------------------------------------

    def _connect(self, patience: float = GREETING) -> None:
        try:
            self._client = self._distributed.Client(**self._address(), timeout=patience, set_as_default=False)
        except (OSError, ValueError, self._distributed.TimeoutError) as error:
            raise UsageError(f"no scheduler answers at {self.where}: {_first_line(error)}") from None
        self._client.subscribe_topic(TOPIC, self._heard)
        if not self._client.scheduler_info()["workers"]:
            self.say(f"{self.where} has no workers yet; waiting for them")

    def _address(self) -> dict[str, Any]:
        if self._own is not None:
            return {"address": self._own}
        if "://" in self.where:
            return {"address": self.where}
        if Path(self.where).is_file():
            return {"scheduler_file": self.where}
        raise UsageError(
            f"--cluster must be tcp://host:port, local:N or the path of a scheduler file, got {self.where!r}"
        )

    def _reconnect(self) -> None:
        """Wait for the scheduler where the connection is gone."""
        if self._client.status == "running" and self._answers():
            return
        self.say(f"the connection to {self.where} is lost; waiting for the scheduler to come back")
        self._client.close(timeout=1)
        deadline = time.monotonic() + self.patience
        while True:
            try:
                self._connect()
            except UsageError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)
            else:
                self.say(f"{self.where} answers again; what was under way starts again")
                return

    def _answers(self) -> bool:
        try:
            return bool(self._client.sync(self._client.scheduler.identity, callback_timeout=GREETING))
        except (OSError, self._distributed.TimeoutError):
            return False

    def _heard(self, event: tuple[float, Mapping[str, Any]]) -> None:
        seen = event[1]
        self._on_progress(Progress(seen["slug"], seen["fraction"], seen["label"]))


def execute_remote(job: Job, claims: Sequence[Claim], version: str) -> Evidence:
    """On a worker: run one job as on one machine, with the cores of this worker; ends when nobody waits for it."""
    distributed = require("distributed", "cluster")
    worker = distributed.get_worker()
    if code_version() != version:
        raise UsageError(f"the worker {worker.address} runs locally {code_version()}, this machine {version}")
    wanted, stop, done = still_wanted(), Event(), Event()

    def watch() -> None:
        while not done.wait(POLL):
            if not wanted():
                stop.set()

    def tell(seen: Progress) -> None:
        worker.log_event(TOPIC, {"slug": seen.slug, "fraction": seen.fraction, "label": seen.label})

    Thread(target=watch, daemon=True).start()
    distributed.secede()  # the thread is free for seeds of this and other experiments; EXPERIMENT stays taken
    try:
        threads = max(1, worker.state.nthreads)
        seeds_go_to = {CLUSTER: worker.scheduler.address}
        return execute(replace(job, threads=threads), claims, tell, stop, variables=seeds_go_to)
    finally:
        done.set()


def _given_up(job: Job, reason: str) -> Evidence:
    return Evidence(
        slug=job.slug,
        scale=job.scale,
        status=Status.CRASHED,
        verdict=Verdict(Outcome.INCONCLUSIVE, reason),
        measures=(),
        seeds=job.seeds,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=0.0,
        peak_memory_mib=0.0,
        device=job.device,
        code_version=code_version(),
    )


def say(message: str) -> None:
    print(f"locally: {message}", file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
