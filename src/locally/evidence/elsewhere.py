"""Items of one run on other cores and other machines: a process each, one thread a process, the same records.

A process made here ends when the one that made it does, however it does. What travels is pickled by our own processes
and read by them alone; a cluster's scheduler and workers belong to whoever names them. Every command line imports this
module, so that what only a run needs is imported there.
"""

import contextlib
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locally.errors import require

if TYPE_CHECKING:
    import subprocess
    from concurrent.futures import Executor

    from locally.evidence.runs import Run

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
CLUSTER = "LOCALLY_CLUSTER"  # address of the scheduler whose workers take this process's items
POLL = 0.5  # seconds between looks at whether an item is still wanted
LENGTH = 8  # bytes that say how many follow

Function = Callable[["Run", Any], Any]


@contextlib.contextmanager
def on_cores(processes: int) -> Iterator["Executor"]:
    """Processes of this machine."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    spawn = multiprocessing.get_context("spawn")
    with _single_threaded(), ProcessPoolExecutor(processes, spawn, leave_with_parent) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def on_cluster(address: str) -> Iterator["Executor"]:
    """The workers of a Dask cluster, through its `concurrent.futures` interface; a lost worker's items start again."""
    distributed = require("distributed", "cluster")
    with distributed.Client(address, set_as_default=False) as client:
        pool = client.get_executor(pure=False, retries=3)
        try:
            yield pool
        finally:
            pool.shutdown(wait=False)


def answer(part: "Run", function: Function, item: Any) -> bytes:
    """In another process. Bytes, since tensors would otherwise travel through shared memory, which may be small."""
    result = function(part, item)
    return pickle.dumps((part, result))


def answer_apart(part: "Run", function: Function, item: Any) -> bytes:
    """On a worker of a cluster, whose own process has many threads: in a process and a scratch folder of its own."""
    import subprocess
    import tempfile

    wanted = still_wanted()
    with tempfile.TemporaryDirectory(prefix="locally-", ignore_cleanup_errors=True) as scratch:
        part.scratch = Path(scratch)
        asked = pickle.dumps((part, function, item))
        with subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | dict.fromkeys(THREAD_VARIABLES, "1") | {"MPLBACKEND": "agg"},
        ) as process:
            threading.Thread(target=_end_unwanted, args=(process, wanted), daemon=True).start()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(len(asked).to_bytes(LENGTH) + asked)
            process.stdin.flush()  # it stays open: its end tells the process that we have gone
            answered = process.stdout.read()
    if not answered:
        raise RuntimeError(f"the process of one item left with exit status {process.returncode} before its end")
    result, error = pickle.loads(answered)  # made by `main` in the process that we started
    if error is not None:
        raise error
    return result


def still_wanted() -> Callable[[], bool]:
    """On a worker of a cluster: whether anybody still waits for the task that calls this; ask from any thread."""
    worker = require("distributed", "cluster").get_worker()
    key = worker.get_current_task()

    def wanted() -> bool:
        task = worker.state.tasks.get(key)
        return task is not None and task.state in ("executing", "long-running")

    return wanted


def main() -> None:
    """One item: asked for on standard input, answered on standard output; what it prints goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    asked = sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(LENGTH)))
    threading.Thread(target=_leave_at_end_of_input, daemon=True).start()
    result: bytes | None = None
    problem: Exception | None = None
    try:
        result = answer(*pickle.loads(asked))
    except Exception as error:
        problem = _portable(error)
    with answers:
        pickle.dump((result, problem), answers)


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception's own pickling may raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_unwanted(process: "subprocess.Popen[bytes]", wanted: Callable[[], bool]) -> None:
    from subprocess import TimeoutExpired

    while process.poll() is None:
        if not wanted():
            process.kill()
        with contextlib.suppress(TimeoutExpired):
            process.wait(POLL)


def _leave_at_end_of_input() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Processes that are started now compute with one thread each."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def forking_server(room: str) -> Any:
    """A context of `multiprocessing` whose one server has a room loaded and forks, or that spawns where none does.

    A process then starts in milliseconds, and without the caller's threads.
    """
    import multiprocessing

    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", room])
    return context


def leave_with_parent() -> None:
    """In a process that `multiprocessing` has started: end when its parent does, however it does, at any time."""
    from multiprocessing import parent_process

    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
