"""Experiments on a Dask cluster of real processes, and what happens to them when parts of it fail."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from locally import catalogue
from locally.errors import UsageError
from locally.evidence import Scale, Status
from locally.page.cluster import Cluster
from locally.page.worker import Job

pytest.importorskip("distributed", reason="needs the extra cluster")

# says that it runs and where, then waits until the test lets it end
SLOW = """
import os, pathlib, time
folder = pathlib.Path(os.environ["TEST_SIGNS"])
def experiment(run):
    (folder / f"started-{os.getpid()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.05)
    for seed in run.seeds: run.record("ours", "error", 0.5 + 0.01 * seed, seed=seed)
"""
# one item a seed, side by side where the run may
SEEDS = """
import os
from tests.page.seeds_on_cluster import where
def experiment(run):
    pids = run.parallel(where, run.seeds, "seeds")
    run.record("ours", "processes", len(set(pids) - {os.getpid()}))
"""


class Machines:
    """A scheduler and workers, each in processes of its own."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.folder, self.host = folder, host
        with socket.socket() as free:
            free.bind((host, 0))
            self.port = free.getsockname()[1]
        self.address = f"tcp://{host}:{self.port}"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self.start_scheduler()

    def start_scheduler(self) -> "subprocess.Popen[bytes]":
        words = ["--host", self.host, "--port", str(self.port), "--no-dashboard"]
        self.scheduler = self._start("scheduler", *words, "--scheduler-file", str(self.folder / "scheduler.json"))
        return self.scheduler

    def start_worker(self, *within: str, **resources: float) -> "subprocess.Popen[bytes]":
        """`within` is the command that starts it somewhere, such as in a network of its own."""
        offered = " ".join(f"{k}={v}" for k, v in {"EXPERIMENT": 1.0, **resources}.items())
        words = ["--nthreads", "1", "--no-dashboard", "--resources", offered, "--local-directory", str(self.folder)]
        return self._start("worker", self.address, *words, within=within)

    def _start(self, *words: str, within: tuple[str, ...] = ()) -> "subprocess.Popen[bytes]":
        log = open(self.folder / f"log-{len(self.processes)}", "wb")  # noqa: SIM115 - the process writes it
        command = [*within, sys.executable, "-m", "dask", *words]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.processes.append(process)
        return process

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """As when the machine loses power: the nanny and its worker at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        for process in self.processes:
            self.kill(process)


@pytest.fixture
def signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "signs"
    folder.mkdir()
    monkeypatch.setenv("TEST_SIGNS", str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return folder


@pytest.fixture
def machines(tmp_path: Path, signs: Path, add_paper: Callable[..., Path]) -> Iterator[Machines]:
    (tmp_path / "machines").mkdir()
    cluster = Machines(tmp_path / "machines")
    yield cluster
    cluster.close()


def until(happened: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def job(slug: str, **options: object) -> tuple[Job, tuple]:
    claims = catalogue.find(catalogue.load(), slug).claims
    return Job(slug, Scale.QUICK, (0, 1, 2), **options), claims


def in_background(*words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "locally.cli", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_papers_run_on_the_cluster_and_are_stored_once(machines, add_paper, home, tmp_path):
    for slug in ("one", "two", "three"):
        add_paper(slug)
    machines.start_worker()
    machines.start_worker()
    until((machines.folder / "scheduler.json").exists)
    for where in (machines.address, str(machines.folder / "scheduler.json")):
        ended = in_background("run", "one", "two", "three", "--scale", "quick", "--cluster", where, "--json")
        out, err = ended.communicate(timeout=120)
        assert ended.returncode == 0, err
        shown = [json.loads(line) for line in out.splitlines()]
        assert sorted(s["slug"] for s in shown) == ["one", "three", "two"]
        assert {s["verdict"] for s in shown} == {"holds"}
    from locally.page.store import Store

    assert [len(Store().history(slug)) for slug in ("one", "two", "three")] == [2, 2, 2]


def test_a_killed_worker_loses_time_only(machines, add_paper, signs):
    add_paper("slow", SLOW)
    add_paper("quick")
    victim = machines.start_worker()
    heard: list[str] = []
    with Cluster(machines.address, say=heard.append) as cluster:
        runs = cluster.run([job("slow"), job("quick")])
        first = in_thread(runs)
        until(lambda: list(signs.glob("started-*")))
        machines.kill(victim)
        (lost,) = (int(f.name.split("-")[1]) for f in signs.glob("started-*"))
        until(lambda: not alive(lost))  # an experiment ends with its worker
        machines.start_worker()
        until(lambda: len(list(signs.glob("started-*"))) == 2)
        (signs / "go").touch()
        ended = first()
    assert sorted((e.slug, e.status) for e in ended) == [("quick", Status.FINISHED), ("slow", Status.FINISHED)]
    assert {len(e.measures) for e in ended} == {3, 18}


def test_a_restarted_scheduler_takes_the_work_up_again(machines, add_paper, signs):
    add_paper("slow", SLOW)
    machines.start_worker()
    heard: list[str] = []
    with Cluster(machines.address, say=heard.append) as cluster:
        ended = in_thread(cluster.run([job("slow")]))
        until(lambda: list(signs.glob("started-*")))
        machines.kill(machines.scheduler)
        machines.start_scheduler()
        until(lambda: any("answers again" in said for said in heard), 120)
        machines.start_worker()
        (signs / "go").touch()
        (evidence,) = ended()
    assert evidence.status is Status.FINISHED
    assert any("is lost" in said for said in heard)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def other_network() -> Iterator[str]:
    """A network namespace at 10.83.<x>.2 that a cable joins to this machine at 10.83.<x>.1."""
    name = f"locally{os.getpid() % 100000}"
    near, far, net = f"{name}a"[-15:], f"{name}b"[-15:], f"10.83.{os.getpid() % 250}"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine allows no network namespaces: {error}")
    try:
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        ip("addr", "add", f"{net}.1/24", "dev", near)
        ip("link", "set", near, "up")
        for words in (
            ["addr", "add", f"{net}.2/24", "dev", far],
            ["link", "set", far, "up"],
            ["link", "set", "lo", "up"],
        ):
            ip("netns", "exec", name, "ip", *words)
        yield f"{name} {near} {net}.1"
    finally:
        ip("netns", "del", name)


def test_a_network_cut_for_twenty_seconds_loses_and_repeats_nothing(other_network, tmp_path, signs, add_paper):
    name, cable, host = other_network.split()
    add_paper("slow", SLOW)
    (tmp_path / "machines").mkdir()
    machines = Machines(tmp_path / "machines", host)
    try:
        machines.start_worker("ip", "netns", "exec", name)
        command = in_background("run", "slow", "--scale", "quick", "--cluster", machines.address, "--json")
        until(lambda: list(signs.glob("started-*")))
        ip("link", "set", cable, "down")
        (signs / "go").touch()  # it ends while nobody can hear of it
        time.sleep(20)
        assert command.poll() is None
        ip("link", "set", cable, "up")
        out, err = command.communicate(timeout=120)
    finally:
        machines.close()
    assert command.returncode == 0, err
    assert json.loads(out)["verdict"] == "holds"
    assert len(list(signs.glob("started-*"))) == 1


def test_leaving_early_ends_what_runs(machines, add_paper, signs):
    add_paper("slow", SLOW)
    machines.start_worker()
    command = in_background("run", "slow", "--scale", "quick", "--cluster", machines.address)
    until(lambda: list(signs.glob("started-*")))
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 130
    assert "0 finished of 1 kept" in err
    (pid,) = (int(f.name.split("-")[1]) for f in signs.glob("started-*"))
    until(lambda: not alive(pid))


def test_what_the_cluster_lacks_is_said(machines, add_paper, tmp_path):
    add_paper("good")
    with (
        pytest.raises(UsageError, match=r"no scheduler answers at tcp://127\.0\.0\.1:1"),
        Cluster("tcp://127.0.0.1:1", say=print),
    ):
        pass
    with pytest.raises(UsageError, match="--cluster must be"), Cluster(str(tmp_path / "absent.json"), say=print):
        pass
    with pytest.raises(UsageError, match="needs a number of workers"), Cluster("local:many", say=print):
        pass
    heard: list[str] = []
    until((machines.folder / "scheduler.json").exists)
    with Cluster(machines.address, say=heard.append) as cluster:
        assert "has no workers yet" in heard[0]
        machines.start_worker()
        until(lambda: cluster._client.scheduler_info()["workers"])
        with pytest.raises(UsageError, match="offers a GPU"):
            list(cluster.run([job("good", device="cuda")]))


def test_another_version_on_a_worker_is_refused(machines, add_paper, monkeypatch):
    add_paper("good")
    machines.start_worker()
    with Cluster(machines.address, say=print) as cluster:
        monkeypatch.setattr("locally.page.cluster.code_version", lambda: "0.0.1+other")
        with pytest.raises(UsageError, match=r"the worker .* runs locally .*, this machine 0\.0\.1\+other"):
            list(cluster.run([job("good")]))


def test_seeds_go_to_the_cluster_and_record_the_same(machines, add_paper, signs):
    add_paper("seeds", SEEDS)
    machines.start_worker()
    machines.start_worker()
    with Cluster(machines.address, say=print) as cluster:
        (evidence,) = cluster.run([job("seeds")])
    assert evidence.status is Status.FINISHED, evidence.log
    errors = [m.value for m in evidence.measures if m.metric == "error"]
    assert errors == [0.0, 0.1, 0.2]
    assert [m.value for m in evidence.measures if m.metric == "processes"] == [3]


def test_local_workers_need_no_scheduler(add_paper):
    add_paper("good")
    with Cluster("local:1", say=print) as cluster:
        (evidence,) = cluster.run([job("good")])
    assert evidence.label == "holds"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def in_thread(runs: Iterator) -> Callable[[], list]:
    """Start to collect; the result waits for the end."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(1).submit(list, runs).result
