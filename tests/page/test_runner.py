"""One experiment cannot hurt another: crashes, kills, hangs and hunger end as a status with a reason."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from locally import catalogue
from locally.evidence import Outcome, Scale, Status
from locally.page.runner import (
    code_version,
    execute,
    git_revision,
    items_kept,
    run_jobs,
    study_folder,
    working_folder,
)
from locally.page.worker import Job


@pytest.fixture
def run_paper(add_paper):
    """Put an experiment on the page and run it."""

    def run(code, stop=None, on_progress=lambda _: None, **limits):
        add_paper("subject", code)
        paper = catalogue.find(catalogue.load(), "subject")
        return execute(Job("subject", Scale.QUICK, (0, 1), **limits), paper.claims, on_progress, stop)

    return run


def test_a_run_leaves_its_evidence(run_paper):
    seen = []
    evidence = run_paper(
        "import numpy, os\n"
        "def experiment(run):\n"
        "    print('on standard output')\n"
        "    x = numpy.ones(30_000_000)\n"  # 229 MiB
        "    for seed in run.track(run.seeds, 'seeds'):\n"
        "        run.record('ours', 'error', 0.5, seed=seed)\n"
        "        run.record('ours', 'threads', int(os.environ['OMP_NUM_THREADS']))\n"
        "    run.plot_bars('error')\n",
        on_progress=seen.append,
        threads=3,
    )
    assert evidence.status is Status.FINISHED
    assert evidence.verdict.outcome is Outcome.HOLDS
    assert {m.value for m in evidence.measures if m.metric == "threads"} == {3}
    assert "on standard output" in evidence.log
    assert 229 < evidence.peak_memory_mib < 1000
    assert [f.name for f in evidence.figures] == ["error"]
    assert evidence.figures[0].pdf.startswith(b"%PDF")
    assert {"python", "numpy", "torch", "locally"} <= evidence.versions.keys()
    assert evidence.code_version == code_version()
    assert (seen[-1].fraction, seen[-1].label) == (1.0, "seeds")


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (
            "def experiment(run): raise RuntimeError('the engine broke')",
            Status.CRASHED,
            "RuntimeError: the engine broke",
        ),
        ("import os\ndef experiment(run): os.kill(os.getpid(), 9)", Status.CRASHED, "killed by SIGKILL"),
        ("import os\ndef experiment(run): os._exit(7)", Status.CRASHED, "left with exit status 7"),
        ("import ctypes\ndef experiment(run): ctypes.string_at(0)", Status.CRASHED, "killed by SIGSEGV"),
        ("import nowhere_to_be_found", Status.CRASHED, "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("def experiment(run: broken", Status.CRASHED, "SyntaxError"),
        ("def experiment(run): raise SystemExit(3)", Status.CRASHED, "exit status 3"),
        ("def experiment(run): raise MemoryError('too much')", Status.OUT_OF_MEMORY, "too much"),
        (
            "def experiment(run): raise OSError(28, 'No space left on device')",
            Status.CRASHED,
            "No space left on device",
        ),
        ("def experiment(run): run.data('a.csv', 'figures')", Status.REFUSED, "--data DIR"),
    ],
)
def test_a_crash_is_a_status_with_a_reason(run_paper, code, status, reason):
    evidence = run_paper(code)
    assert evidence.status is status
    assert reason in evidence.verdict.reason
    assert evidence.verdict.outcome is Outcome.INCONCLUSIVE


def test_what_was_recorded_before_a_crash_is_kept(run_paper):
    evidence = run_paper("def experiment(run):\n    run.record('ours', 'error', 0.5, seed=0)\n    1 / 0\n")
    assert [m.value for m in evidence.measures] == [0.5]
    assert "ZeroDivisionError" in evidence.log


def test_a_full_disk_is_reported(run_paper):
    """The result file runs into the file-size limit, as it would into a full disk."""
    evidence = run_paper(
        "import resource, signal\n"
        "def experiment(run):\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "    run.record('ours', 'error', 0.5, seed=0)\n"
    )
    assert evidence.status is Status.CRASHED
    assert "disk full" in evidence.verdict.reason or "File too large" in evidence.verdict.reason


def test_a_hang_ends_at_the_time_limit_with_all_its_processes(run_paper, tmp_path):
    marker = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "def experiment(run):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"    open({str(marker)!r}, 'w').write(str(child.pid))\n"
        "    time.sleep(600)\n"
    )
    evidence = run_paper(code, time_limit=4.0)
    assert evidence.status is Status.TIMED_OUT
    assert "4 s" in evidence.verdict.reason
    with pytest.raises(ProcessLookupError):
        _wait_until_gone(int(marker.read_text()))


def _wait_until_gone(pid: int) -> None:
    for _ in range(50):
        os.kill(pid, 0)
        time.sleep(0.1)


def test_hunger_ends_at_the_memory_limit(run_paper):
    code = "def experiment(run):\n    hoard = []\n    while True: hoard.append(b'x' * 20_000_000)\n"
    evidence = run_paper(code, memory_limit=600.0)
    assert evidence.status is Status.OUT_OF_MEMORY
    assert "600 MiB" in evidence.verdict.reason


def test_a_job_stands_back_as_far_as_it_is_told(run_paper):
    code = "import os\ndef experiment(run): run.record('ours', 'error', os.nice(0), seed=0)\n"
    niceness = [run_paper(code, nice=extra).measures[0].value for extra in (0, 7)]
    assert niceness[1] - niceness[0] == 7


def test_stop_ends_a_run_early(run_paper):
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    evidence = run_paper("import time\ndef experiment(run): time.sleep(600)", stop=stop)
    assert evidence.status is Status.CANCELLED
    assert evidence.seconds < 60


def test_one_crash_leaves_the_others_untouched(add_paper):
    good = "def experiment(run):\n    for s in run.seeds: run.record('ours', 'error', 0.5, seed=s)\n"
    add_paper("good", good)
    add_paper("killed", "import os\ndef experiment(run): os.kill(os.getpid(), 9)")
    add_paper("also-good", good)
    papers = [p for p in catalogue.load() if p.number > 900]
    work = [(Job(p.slug, Scale.QUICK, (0, 1)), p.claims) for p in papers]
    ended = {e.slug: e.label for e in run_jobs(work, at_once=2)}
    assert ended == {"good": "holds", "killed": "crashed", "also-good": "holds"}


def test_jobs_run_at_once_share_out_the_cores(add_paper):
    code = (
        "import os, time\ndef experiment(run):\n    run.record('ours', 'threads', int(os.environ['OMP_NUM_THREADS']))\n"
    )
    slugs = ["one", "two"]
    for slug in slugs:
        add_paper(slug, code)
    claims = catalogue.find(catalogue.load(), "one").claims
    at_once = os.cpu_count() or 1
    for evidence in run_jobs([(Job(s, Scale.QUICK, (0,)), claims) for s in slugs], at_once=at_once):
        assert evidence.measures[0].value == 1


def test_leaving_early_stops_what_runs(add_paper):
    add_paper("quick", "def experiment(run): pass")
    add_paper("slow", "import time\ndef experiment(run): time.sleep(600)")
    work = [(Job(s, Scale.QUICK, (0,)), ()) for s in ("quick", "slow", "slow")]
    begin = time.monotonic()
    for _ in run_jobs(work, at_once=2):
        break
    assert time.monotonic() - begin < 60


LONG = """
import pathlib, time
done = pathlib.Path({folder!r})
def item(run, seed):
    if seed == 2 and not (done / "go").exists(): time.sleep(600)
    with open(done / "log", "a") as log: log.write(f"{{seed}} ")
    run.record("ours", "error", 0.1 * seed, seed=seed)
    return seed
def experiment(run):
    first = run.parallel(item, run.seeds, "seeds")
    run.record("ours", "sum", sum(first))
"""


def test_a_full_size_study_goes_on_where_it_was_stopped(add_paper, tmp_path, home):
    add_paper("long", LONG.format(folder=str(tmp_path)))
    job = Job("long", Scale.PAPER, (0, 1, 2, 3))
    stop = threading.Event()

    def stop_at_the_third():
        while not (tmp_path / "log").exists() or (tmp_path / "log").read_text() != "0 1 ":
            time.sleep(0.05)
        time.sleep(0.5)
        stop.set()

    threading.Thread(target=stop_at_the_third, daemon=True).start()
    assert execute(job, (), stop=stop).status is Status.CANCELLED
    (left,) = (home / "unfinished").glob("long-*-*")
    assert left == study_folder(job)
    assert items_kept(job) == 2
    assert 0 <= float((left / "seconds").read_text()) < 60
    (left / "seconds").write_text("1000.5")
    (tmp_path / "go").touch()
    evidence = execute(job, ())
    assert evidence.status is Status.FINISHED, evidence.log
    assert 1000.5 < evidence.seconds < 1100  # of all attempts
    assert (tmp_path / "log").read_text() == "0 1 2 3 "
    assert [m.value for m in evidence.measures] == pytest.approx([0.0, 0.1, 0.2, 0.3, 6.0])
    assert not left.exists()


def test_what_another_code_has_left_is_not_taken_up(add_paper, tmp_path, home, monkeypatch):
    add_paper("long", LONG.format(folder=str(tmp_path)))
    job = Job("long", Scale.PAPER, (0, 1))
    with monkeypatch.context() as other_code:
        other_code.setattr("locally.page.runner.code_version", lambda: "0.0.1+other")
        with working_folder(job) as folder:
            (folder / "items").mkdir()
    with working_folder(job) as other, working_folder(job) as third:
        assert not folder.exists()
        assert (home / "unfinished") in other.parents
        assert (home / "unfinished") not in third.parents  # two at once do not share a folder
    with working_folder(replace(job, scale=Scale.QUICK)) as fleeting:
        assert (home / "unfinished") not in fleeting.parents
    assert not fleeting.exists()


def test_the_worker_goes_when_its_parent_goes(add_paper, tmp_path):
    marker = tmp_path / "pid"
    code = (
        "import os, time\n"
        "def experiment(run):\n"
        f"    open({str(marker)!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    add_paper("orphan", code)
    parent = subprocess.Popen([sys.executable, "-m", "locally.cli", "run", "orphan", "--scale", "quick"])
    for _ in range(300):
        if marker.exists() and marker.read_text():
            break
        time.sleep(0.1)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    with pytest.raises(ProcessLookupError):
        _wait_until_gone(int(marker.read_text()))


def test_provenance_names_the_code():
    assert code_version().startswith("0.")
    assert code_version() == code_version()
    assert git_revision() == "" or len(git_revision().removesuffix("-dirty")) == 40
