"""Starts one process per node on this machine, lets faults happen to some, and collects what the others made."""

import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from safetensors.torch import load_file, save_file

from locally.checks import check_choice, check_count, check_positive
from locally.evidence.elsewhere import forking_server
from locally.training.byzantine.collaboration import Collaboration, Outcome, Problem, Status
from locally.training.byzantine.processes.drills import LIARS, Drill, Garbage, Lie, Slow, lie_to_all, send_garbage
from locally.training.byzantine.processes.node import NonFiniteModel, train
from locally.training.byzantine.processes.sockets import Membership, SocketTransport, TooFewPeers
from locally.training.byzantine.tolerance import BeyondBreakdown

ORDERS = ("arrival", "seeded")
POLL = 0.02  # seconds between looks at the processes
Callback = Callable[[ndarray], object]


class Processes:
    """Runs a collaboration as n processes that exchange vectors over TCP on this machine.

    Same interface and results as `Simulation`: with order="seeded" and no fault that loses messages, the parameters
    agree up to rounding. Node k takes the problem's data of node k, so faulty nodes that lie need none.

    Args:
        collaboration: what the nodes do; must be picklable, for it is handed to processes that we start.
        drills: faults by rank, at most f.
        order: "arrival": a node goes on with the first n - f vectors of a round; "seeded": it prefers the nodes that
            the simulation of the same seed would let it hear, among them all liars.
        timeout: seconds after which a node gives up a round in which fewer than n - f answer.
        patience: seconds that a node waits for preferred nodes.
        threads: of torch in each process.

    `pids` are the process ids of the latest run, by rank. A node that fails leaves its reason in `Outcome.lost`; the
    status is FINISHED if all nodes that no drill made faulty have finished.
    """

    def __init__(
        self,
        collaboration: Collaboration,
        drills: Mapping[int, Drill] | None = None,
        *,
        order: str = "arrival",
        timeout: float = 30.0,
        patience: float = 1.0,
        threads: int = 1,
    ) -> None:
        drills = dict(drills or {})
        check_choice("order", order, ORDERS)
        check_positive("timeout", timeout)
        check_positive("patience", patience)
        check_count("threads", threads)
        if not all(0 <= rank < collaboration.n for rank in drills):
            raise ValueError(f"drills must be for ranks below n = {collaboration.n}, got {sorted(drills)}")
        if len(drills) > collaboration.f:
            raise BeyondBreakdown(f"drills must be at most f = {collaboration.f}, got {len(drills)}")
        self.collaboration, self.drills, self.order = collaboration, drills, order
        self.timeout, self.patience, self.threads = timeout, patience, threads
        self.pids: list[int] = []

    def run(self, problem: Problem, steps: int, *, callback: Callback | None = None) -> Outcome:
        """Train for `steps` steps.

        Args:
            problem: must be picklable.
            steps: to make.
            callback: sees the steps done by each rank, about 50 times a second; True ends all processes.

        Raises:
            TypeError: collaboration or problem cannot be handed to another process.
        """
        check_count("steps", steps)
        try:
            pickle.dumps((self.collaboration, problem, self.drills))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(f"collaboration, problem and drills must be picklable: {error}") from error
        n = self.collaboration.n
        context = forking_server(__name__)
        progress = context.Array("q", n)
        with tempfile.TemporaryDirectory(prefix="locally-monna-") as folder:
            members = Membership.local(n)
            processes = [
                context.Process(
                    target=_node,
                    args=(member, self, problem, steps, progress, folder),
                    daemon=True,
                    name=f"node {rank}",
                )
                for rank, member in enumerate(members)
            ]
            try:
                for process in processes:
                    process.start()
                self.pids = [process.pid or -1 for process in processes]
                for member in members:
                    member.listener.close()
                stopped = self._watch(processes, progress, callback)
            finally:
                for process in processes:
                    if process.is_alive():
                        process.kill()
                    process.join()
            return self._collect(processes, progress[:], Path(folder), stopped)

    def _watch(self, processes: list[BaseProcess], progress: Any, callback: Callback | None) -> bool:
        """Until every node that is not faulty has ended; True if the callback stopped it."""
        watched = [p for rank, p in enumerate(processes) if rank not in self.drills]
        late: list[BaseProcess] = [p for rank, p in enumerate(processes) if self._finishes_late(rank)]
        while any(p.is_alive() for p in watched):
            if callback is not None and callback(np.array(progress[:])):
                return True
            time.sleep(POLL)
        deadline = time.monotonic() + self.timeout
        while any(p.is_alive() for p in late) and time.monotonic() < deadline:
            time.sleep(POLL)
        return False

    def _finishes_late(self, rank: int) -> bool:
        """A slow node is faulty by the method's count, but gets to the end if it is let."""
        return isinstance(self.drills.get(rank), Slow)

    def _collect(self, processes: list[BaseProcess], done: list[int], folder: Path, stopped: bool) -> Outcome:
        finished, lost = {}, {}
        for rank, process in enumerate(processes):
            file, reason = folder / f"{rank}.safetensors", folder / f"{rank}.txt"
            if file.exists():
                finished[rank] = load_file(file)
            elif not isinstance(self.drills.get(rank), LIARS):
                code = process.exitcode or 0
                ended = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                lost[rank] = reason.read_text() if reason.exists() else f"ended by {ended} after {done[rank]} steps"
        status = Status.FINISHED
        unexpected = {rank: why for rank, why in lost.items() if rank not in self.drills}
        if stopped:
            status = Status.STOPPED
        elif any(NonFiniteModel.__name__ in why for why in unexpected.values()):
            status = Status.DIVERGED
        elif unexpected:
            status = Status.TOO_FEW_PEERS
        nodes = tuple(sorted(finished))
        if not nodes:
            empty = torch.empty(0, 0)
            return Outcome(empty, (), status, 0, 0, momenta=empty, lost=lost)
        rows = [finished[rank] for rank in nodes]
        return Outcome(
            torch.stack([row["parameters"] for row in rows]),
            nodes,
            status,
            min(int(done[rank]) for rank in nodes),
            int(rows[0]["gradients_used"]),
            momenta=torch.stack([row["momentum"] for row in rows]),
            lost=lost,
        )


def _node(membership: Membership, engine: Processes, problem: Problem, steps: int, progress: Any, folder: str) -> None:
    """The life of one process. It leaves a file of numbers or a file of words: nothing that has to be unpickled."""
    torch.set_num_threads(engine.threads)
    rank, drill, c = membership.rank, engine.drills.get(membership.rank), engine.collaboration
    liars = sorted(r for r, d in engine.drills.items() if isinstance(d, LIARS))
    start = problem.start()
    if isinstance(drill, Garbage):
        membership.listener.close()
        send_garbage(membership, drill, start.numel(), os.path.join(folder, "unpickled"), time.monotonic() + 3600)
        return
    transport = SocketTransport(
        membership, f=c.f, entries=start.numel(), dtype=start.dtype, timeout=engine.timeout, patience=engine.patience
    )
    if isinstance(drill, Lie):
        lie_to_all(transport, c, problem, steps, drill, [r for r in liars if isinstance(engine.drills[r], Lie)])
        transport.close()
        return

    def count(done: int) -> None:
        progress[rank] = done

    honest = None if engine.order == "arrival" else [r for r in range(c.n) if r not in liars]
    before = None if drill is None else partial(_drilled, drill, transport)
    try:
        trained = train(transport, c, problem, steps, honest=honest, before_exchange=before, callback=count)
    except (TooFewPeers, NonFiniteModel, ArithmeticError, ValueError) as error:
        Path(folder, f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        transport.close(linger=0)
        return
    result = {
        "parameters": trained.parameters.contiguous(),
        "momentum": trained.momentum.contiguous(),
        "gradients_used": torch.tensor(trained.gradients_used),
    }
    save_file(result, os.path.join(folder, f"{rank}.part"))
    os.replace(os.path.join(folder, f"{rank}.part"), os.path.join(folder, f"{rank}.safetensors"))
    transport.close()


def _drilled(drill: Any, transport: SocketTransport, step: int) -> None:
    drill.before_exchange(step, transport)
