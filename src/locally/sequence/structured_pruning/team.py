"""Processes that prune one model together: what one tells the others, in tensors alone.

They are the members of a group of torch.distributed, over gloo, each with the model at hand and a work folder that all
of them see. Nothing that a peer sends is unpickled.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from locally.errors import UsageError

PATIENCE = timedelta(hours=6)  # with a member that says nothing: the largest layers take long


class LostMember(UsageError, RuntimeError):
    """A member of the group has ended before the work did."""


class Team:
    """The members of a process group; this process alone where there is no group.

    Args:
        group: of torch.distributed, whose backend moves tensors in main memory, as gloo does.

    Attributes:
        rank, size: of this process and of the group.

    >>> Team().size, Team().share(12)
    (1, slice(0, 12, None))
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, items: int) -> slice:
        """Which of so many items are this member's: shares differ by one item at most."""
        return slice(items * self.rank // self.size, items * (self.rank + 1) // self.size)

    def reduce(self, tensor: Tensor, to: int) -> None:
        """Sum of all members' tensors, in place, at member `to`; what the others hold then means nothing."""
        self._exchange(dist.reduce, tensor, lambda group: {"dst": dist.get_global_rank(group, to)})

    def sum(self, tensor: Tensor) -> None:
        """The same for all members."""
        self._exchange(dist.all_reduce, tensor)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """What member `source` has, in place of what the others had."""
        self._exchange(dist.broadcast, tensor, lambda group: {"src": dist.get_global_rank(group, source)})

    def least(self, number: int) -> int:
        """Of the numbers that the members call this with."""
        lowest = torch.tensor(number)
        self._exchange(dist.all_reduce, lowest, lambda _: {"op": dist.ReduceOp.MIN})
        return int(lowest)

    def wait(self) -> None:
        """Until all members have come to this point."""
        self.least(0)

    def _exchange(
        self,
        collective: Callable[..., Any],
        tensor: Tensor,
        options: Callable[["dist.ProcessGroup"], dict[str, Any]] = lambda _: {},
    ) -> None:
        if self.group is None or self.size == 1:
            return
        here = tensor.cpu().contiguous()
        try:
            collective(here, group=self.group, **options(self.group))
        except RuntimeError as error:
            raise LostMember(
                f"process {self.rank} of {self.size} has lost another one: {_first_sentence(error)}; "
                "what is finished is kept in the work folder, and the same call goes on from there"
            ) from error
        if here is not tensor:
            tensor.copy_(here)


def processes_started() -> int:
    """How many torchrun, or whoever sets its variables, has started together with this one."""
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdigit() or int(said) < 1:
        raise UsageError(f"WORLD_SIZE must be a number of processes, got {said!r}")
    return int(said)


@contextmanager
def team_of_environment() -> Iterator[Team]:
    """The processes that were started together; one alone is a team too.

    Raises:
        UsageError: the variables are incomplete, or the others do not come.
    """
    if processes_started() == 1:
        yield Team()
        return
    try:
        dist.init_process_group("gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"this process cannot join the others: {_first_sentence(error)}") from None
    try:
        yield Team(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _first_sentence(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
