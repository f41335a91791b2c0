"""Starts the processes of a team on this machine, and ends all of them when one ends before its time."""

import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from locally.checks import check_count
from locally.errors import UsageError
from locally.evidence.elsewhere import forking_server, leave_with_parent
from locally.sequence.structured_pruning.team import PATIENCE, LostMember, Team

REFUSED, LOST = "refused", "lost"  # what the words that a process leaves behind are about

Work = Callable[[Team], None]


def launch(processes: int, work: Work, *, on_start: Callable[[list[int]], None] | None = None) -> None:
    """Run `work(team)` in so many processes, which share out this one's threads, and wait for all of them.

    Args:
        work: picklable; a function at the top of a module, or a `functools.partial` of one.
        on_start: called with the ids of the processes, by rank.

    Raises:
        UsageError: a process raised it; the others were ended.
        LostMember: a process ended in another way before its work was done; likewise.
    """
    check_count("processes", processes)
    threads = max(1, torch.get_num_threads() // processes)
    context = forking_server(__name__)
    with tempfile.TemporaryDirectory(prefix="locally-team-") as folder:
        members: list[BaseProcess] = [
            context.Process(target=_member, args=(rank, processes, threads, folder, work), daemon=True)
            for rank in range(processes)
        ]
        try:
            for member in members:
                member.start()
            if on_start is not None:
                on_start([member.pid or -1 for member in members])
            left = list(members)
            while left and not any(member.exitcode for member in members):
                wait([member.sentinel for member in left])
                left = [member for member in left if member.is_alive()]
            failed = [rank for rank, member in enumerate(members) if member.exitcode]
        finally:
            for member in members:
                if member.is_alive():
                    member.kill()
                member.join()
        if failed:
            raise _cause(failed, members, Path(folder))


def _cause(failed: list[int], members: list[BaseProcess], folder: Path) -> UsageError:
    """Why the first process ended: who only lost its peer is asked last."""
    codes = {rank: members[rank].exitcode or 0 for rank in failed}
    for rank in sorted(failed, key=lambda r: (_told(folder, r, LOST) != "", codes[r] > 0)):
        for kind, error in ((REFUSED, UsageError), (LOST, LostMember)):
            if told := _told(folder, rank, kind):
                return error(told)
        code = codes[rank]
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit status {code}"
        return LostMember(
            f"process {rank} of {len(members)} {how} before the work was done; the others were ended too. What is "
            "finished is kept in the work folder, and the same call goes on from there"
        )
    raise AssertionError("nobody failed")


def _told(folder: Path, rank: int, kind: str) -> str:
    file = folder / f"{rank}.{kind}"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _member(rank: int, size: int, threads: int, folder: str, work: Work) -> None:
    """The life of one process. Why it failed it leaves as a file of words."""
    leave_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started us ends us
    torch.set_num_threads(threads)
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())  # reachable from this machine alone
    reason = Path(folder, str(rank))
    try:
        store = dist.FileStore(f"{folder}/store", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
        work(Team(dist.group.WORLD))
        dist.destroy_process_group()
    except LostMember as error:
        reason.with_suffix(f".{LOST}").write_text(str(error), encoding="utf-8")
        os._exit(1)
    except UsageError as error:
        reason.with_suffix(f".{REFUSED}").write_text(str(error), encoding="utf-8")
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: an ordinary end would wait for the peers


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
