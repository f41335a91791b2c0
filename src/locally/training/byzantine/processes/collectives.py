"""Exchange by one all-gather of torch.distributed, gloo or nccl: fast among nodes that all answer.

Lies are survived as on any transport. Silence is not: a collective ends with its slowest member, so a dead node stops
all of them until the group's timeout, and then for good. Use `SocketTransport` where nodes may die.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from locally.checks import check_count
from locally.training.byzantine.processes.sockets import TooFewPeers


class CollectiveTransport:
    """A process group as transport; the tensors stay on the group's device.

    Args:
        f: bound on the faulty nodes.
        group: of torch.distributed, the default one by default; it must have been initialised.
    """

    def __init__(self, *, f: int, group: dist.ProcessGroup | None = None) -> None:
        check_count("f", f, at_least=0)
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed has no process group yet: call init_process_group first")
        self.f, self.group = f, group
        self.rank, self.n = dist.get_rank(group), dist.get_world_size(group)
        self.refused: dict[int, str] = {}

    def exchange(
        self, round: int, vector: Float[Tensor, " D"], prefer: Iterable[int] | None = None
    ) -> Float[Tensor, "m D"]:
        """n - f finite vectors of this round in the order of their ranks: the preferred ones first, else drawn by lot.

        Raises:
            TooFewPeers: a member did not take part within the group's timeout, or sent NaN with too many others.
        """
        gathered = [torch.empty_like(vector) for _ in range(self.n)]
        try:
            dist.all_gather(gathered, vector.detach().contiguous(), group=self.group)
        except RuntimeError as error:
            raise TooFewPeers(f"the collective of round {round} failed: {error}") from error
        stacked = torch.stack(gathered)
        finite = stacked.isfinite().all(1).tolist()
        self.refused |= {p: f"sent NaN or infinity in round {round}" for p, good in enumerate(finite) if not good}
        order = [self.rank, *(prefer or ()), *np.random.default_rng([self.rank, round]).permutation(self.n).tolist()]
        chosen = [peer for peer in dict.fromkeys(order) if finite[peer]][: self.n - self.f]
        if len(chosen) < self.n - self.f:
            raise TooFewPeers(f"only nodes {sorted(chosen)} sent finite vectors in round {round}")
        return stacked[sorted(chosen)]

    def close(self) -> None:
        """The group belongs to the caller."""
