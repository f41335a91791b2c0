"""MoNNA as a torch optimizer: one process per node, any model, any training loop."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from locally.checks import check_nonnegative
from locally.training.byzantine.aggregation import Rule
from locally.training.byzantine.collaboration import Collaboration
from locally.training.byzantine.processes.node import NonFiniteModel, Transport


class MoNNA(torch.optim.Optimizer):
    """Local momentum step, then nearest-neighbour averaging with the peers (arXiv 2209.10931, Algorithm 1).

    All nodes must start from the same parameters and make as many steps; buffers such as running statistics stay local
    and are not defended. Parameters without a gradient keep their momentum at zero and are averaged all the same.

    Args:
        params: of the model, of one floating dtype and device.
        lr: positive; schedulers may change it.
        transport: to the peers, a `SocketTransport` or `CollectiveTransport` for as many entries as there are
            parameters.
        f: bound on the faulty nodes.
        beta: momentum in [0, 1), the paper's 0.99 by default; an average that starts at zero, so that runs want to be
            longer than 1 / (1 - beta) steps.
        weight_decay: added to the gradients as weight_decay * parameter.
        rule: `NearestNeighborAverage(f)` by default.
        rounds: of exchange in each step.

    Raises:
        ValueError: an argument is out of range, or f more than the rule stands.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        transport: Transport,
        f: int,
        beta: float = 0.99,
        weight_decay: float = 0.0,
        rule: Rule | None = None,
        rounds: int = 1,
    ) -> None:
        check_nonnegative("weight_decay", weight_decay)
        self.collaboration = Collaboration(n=transport.n, f=f, lr=lr, beta=beta, rule=rule, rounds=rounds)
        self.transport = transport
        self.round = 0
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})
        kinds = {(p.dtype, p.device) for group in self.param_groups for p in group["params"]}
        if len(kinds) != 1 or not next(iter(kinds))[0].is_floating_point:
            raise TypeError(f"params must have one floating dtype and device, got {sorted(map(str, kinds))}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One local step and `rounds` exchanges; waits for the peers.

        Raises:
            NonFiniteModel: the half step holds NaN or infinity; the parameters are as before.
            TooFewPeers: fewer than n - f nodes answered in time; likewise.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        halves, parameters = [], []
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                if p.grad is not None:
                    momentum.mul_(group["beta"]).add_(p.grad, alpha=1 - group["beta"])
                    momentum.add_(p, alpha=(1 - group["beta"]) * group["weight_decay"])
                halves.append((p - group["lr"] * momentum).reshape(-1))
                parameters.append(p)
        x = torch.cat(halves)
        for _ in range(self.collaboration.rounds):
            if not bool(x.isfinite().all()):
                raise NonFiniteModel(f"node {self.transport.rank} has NaN or infinity in its step {self.round}")
            x = self.collaboration.mixing(self.transport.exchange(self.round, x), x)
            self.round += 1
        for p, values in zip(parameters, x.split([p.numel() for p in parameters])):
            p.copy_(values.view_as(p))
        return loss
