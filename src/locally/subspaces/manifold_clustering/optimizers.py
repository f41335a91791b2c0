"""Adam, momentum and LARS for the few tensors of one network.

Written out here because the first `torch.optim.Optimizer` of a process imports the compiler, which takes longer than a
short training. The updates are those of torch's `Adam` and `SGD`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locally.checks import check_nonnegative, check_positive


@dataclass(frozen=True)
class Group:
    """Parameters with one weight decay, which is added to their gradients."""

    parameters: Sequence[nn.Parameter]
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_nonnegative("weight_decay", self.weight_decay)


class Optimizer(ABC):
    """Parameters without a gradient stay as they are and get no state."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups
        self.numbered = [(p, group.weight_decay) for group in groups for p in group.parameters]
        self._state: dict[int, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        check_positive("lr", lr)
        for number, (p, weight_decay) in enumerate(self.numbered):
            if p.grad is not None:
                self._update(p, p.grad, weight_decay, lr, self._state.setdefault(number, {}))

    def zero_grad(self) -> None:
        for p, _ in self.numbered:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that a later run needs to go on, under names number/quantity."""
        return {f"{number}/{name}": value for number, state in self._state.items() for name, value in state.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self._state = {}
        for key, value in tensors.items():
            number, name = key.split("/")
            own = self.numbered[int(number)][0]
            self._state.setdefault(int(number), {})[name] = value.to(own.device) if value.ndim else value

    @abstractmethod
    def _update(
        self, p: Tensor, gradient: Tensor, weight_decay: float, lr: float, state: dict[str, Tensor]
    ) -> None: ...


class Adam(Optimizer):
    """arXiv 1412.6980, weight decay as a gradient; betas 0.9 and 0.999, epsilon 1e-8."""

    def _update(self, p: Tensor, gradient: Tensor, weight_decay: float, lr: float, state: dict[str, Tensor]) -> None:
        if not state:
            state |= {"mean": torch.zeros_like(p), "square": torch.zeros_like(p), "count": torch.zeros(())}
        if weight_decay:
            gradient = gradient.add(p, alpha=weight_decay)
        state["count"] += 1
        count = int(state["count"])
        mean = state["mean"].lerp_(gradient, 0.1)
        square = state["square"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        root = square.sqrt().div_((1 - 0.999**count) ** 0.5).add_(1e-8)
        p.addcdiv_(mean, root, value=-lr / (1 - 0.9**count))


class Momentum(Optimizer):
    """Stochastic gradients with momentum 0.9."""

    def _update(self, p: Tensor, gradient: Tensor, weight_decay: float, lr: float, state: dict[str, Tensor]) -> None:
        gradient = gradient.add(p, alpha=weight_decay) if weight_decay else gradient
        if not state:
            state["velocity"] = torch.zeros_like(p)
        p.sub_(state["velocity"].mul_(0.9).add_(gradient), alpha=lr)


class LARS(Momentum):
    """Momentum with a rate for each layer, lr min(1, 0.02 |w| / (lr |g + decay w|)); arXiv 1708.03888.

    Biases and normalisation weights take plain momentum steps without decay.
    """

    trust = 0.02

    def _update(self, p: Tensor, gradient: Tensor, weight_decay: float, lr: float, state: dict[str, Tensor]) -> None:
        if p.ndim > 1:
            gradient = gradient.add(p, alpha=weight_decay)
            size, length = p.norm(), gradient.norm()
            rate = (self.trust * size / (length * lr)).clamp(max=1)
            gradient = gradient * torch.where((size > 0) & (length > 0), rate, torch.ones_like(rate))
        super()._update(p, gradient, 0.0, lr, state)
