"""Momentum auxiliary networks: before a block's local head stands a moving average of the next block's first stage.

So something of what the next block needs comes back across a border that no gradient crosses. An addition to any rule
of local learning. Source: arXiv 2407.05623, section 3, and its authors' code.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from locally.checks import check_between, check_choice, check_count
from locally.training.local_learning.initialization import reinitialize
from locally.training.local_learning.isolation import Objective, Plan, Rule
from locally.training.local_learning.rules import width_of

__all__ = ["MomentumAuxiliary"]


@dataclass(frozen=True, kw_only=True)
class MomentumAuxiliary:
    """Wraps `base`: its head reads EMA(h) + bias(h) instead of the block's output h.

    EMA is a copy of the first stage of the next block that no gradient trains; after every backward its parameters move
    to m EMA + (1 - m) (that stage's). Gradients do pass through it, to the block.

    Args:
        base: the rule whose heads and losses are used, e.g. `DGL()`.
        momentum: m in [0, 1]; 0 copies the next stage at each step, 1 keeps a random one.
        bias: what makes up for the mismatch of features: "branch", a second copy that the local loss trains (the
            authors' "learnable bias", a whole stage); "affine", a scale and shift a channel on EMA's output; or None.
        ema: False leaves only the trained branch: the control for its additional stage.
        init: "independent" draws EMA and branch anew (the authors' code: for about 1 / (1 - m) steps EMA is mostly
            random), "copy" starts from the next block's weights.
        scope: "first_stage" of the next block, or the whole "block".
        train_ema: EMA takes gradient steps too, before it is averaged, as the paper's text can be read.
        every: average only at each so many steps, with m to that power, where parameters must travel.

    Raises:
        TypeError: `every` is no integer.
        ValueError: a number or word is out of range, or neither EMA nor branch is left.

    Source: arXiv 2407.05623, equations 4 to 6.

    >>> from locally.training.local_learning import DGL, LocalLearner, cifar_resnet
    >>> x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    >>> rule = MomentumAuxiliary(base=DGL(), momentum=0.995)
    >>> learner = LocalLearner(cifar_resnet(8), rule, example=x, classes=10)
    >>> learner.local_step(x, y).shape
    torch.Size([4])
    """

    base: Rule
    momentum: float = 0.995
    bias: str | None = "branch"
    ema: bool = True
    init: str = "independent"
    scope: str = "first_stage"
    train_ema: bool = False
    every: int = 1

    def __post_init__(self) -> None:
        check_between("momentum", self.momentum, 0, 1)
        check_choice("bias", self.bias, ("branch", "affine", None))
        check_choice("init", self.init, ("independent", "copy"))
        check_choice("scope", self.scope, ("first_stage", "block"))
        check_count("every", self.every)
        if not self.ema and self.bias != "branch":
            raise ValueError(f'without ema, bias must be "branch", got {self.bias!r}')

    def default_starts(self, n_stages: int) -> Sequence[int]:
        """Those of `base`; a warning where there is one stage only, which has no next one."""
        if n_stages < 2:
            warnings.warn("one block has no next one: a momentum auxiliary network does nothing", stacklevel=2)
        return self.base.default_starts(n_stages)

    def build(self, plan: Plan, block: int, stage: int) -> Objective:
        """The objective of `base`, which reads the moving average of what `scope` names instead of the block.

        Raises:
            ValueError: that stage has no parameters to average.
        """
        following = plan.block(block + 1)
        source = following[:1] if self.scope == "first_stage" else following
        modules = [plan.chain.stages[i] for i in source]
        if any(next(m.parameters(), None) is None for m in modules[:1]):
            raise ValueError(f"stage {source[0]} has no parameters to average: begin block {block + 1} elsewhere")
        base = self.base.build(plan, block, source[-1])
        return MomentumObjective(self, base, modules, width_of(plan.shapes[source[-1]]), plan.generator)


class MomentumObjective(Objective):
    """The base rule's objective behind a moving average of the next block's stages and its trained twin."""

    steps: Tensor

    def __init__(
        self,
        rule: MomentumAuxiliary,
        base: Objective,
        source: Sequence[nn.Module],
        width: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.rule = rule
        self._source = tuple(source)  # a tuple: they belong to the network, not to this objective
        self.network = Twins(rule, source, width, generator)
        self.base = base
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(
        self, h: Float[Tensor, "b *features"], y: Shaped[Tensor, "b *target"], x: Shaped[Tensor, "b *input"]
    ) -> Float[Tensor, ""]:
        return self.base(self.network(h), y, x)

    @torch.no_grad()
    def after_backward(self) -> None:
        """EMA <- m EMA + (1 - m) theta, before theta's own step of this round."""
        self.base.after_backward()
        if self.network.ema is None:
            return
        self.steps += 1
        if self.rule.every > 1 and int(self.steps) % self.rule.every:
            return
        theta = [p.detach() for stage in self._source for p in stage.parameters()]
        self.network.follow(theta, self.rule.momentum**self.rule.every)


class Twins(nn.Module):
    """EMA(h) + branch(h), or what of it a rule leaves."""

    def __init__(
        self, rule: MomentumAuxiliary, source: Sequence[nn.Module], width: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        copies = [nn.Sequential(*(copy.deepcopy(stage) for stage in source)) for _ in range(2)]
        for twin in copies:
            for p in twin.parameters():
                p.grad = None
            if rule.init == "independent":
                reinitialize(twin, generator)
        self.branch = copies[0] if rule.bias == "branch" else None
        self.ema = copies[1] if rule.ema else None
        self.affine = Affine(width) if rule.bias == "affine" else None
        if self.ema is not None:
            self.ema.requires_grad_(rule.train_ema)
            self._keep_averages()

    def _keep_averages(self) -> None:
        # In 16 bits (1 - m)(theta - EMA) would be rounded away: average in 32 and compute with a copy.
        for i, p in enumerate(() if self.ema is None else self.ema.parameters()):
            if p.dtype in (torch.float16, torch.bfloat16):
                kept = getattr(self, f"average_{i}", p.detach())
                self.register_buffer(f"average_{i}", kept.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Twins":
        super()._apply(fn, recurse)  # where modules are cast and moved
        self._keep_averages()
        return self

    def forward(self, h: Float[Tensor, "b *features"]) -> Float[Tensor, "b *following"]:
        if self.ema is None:
            assert self.branch is not None
            return self.branch(h)
        z = self.ema(h)
        if self.affine is not None:
            z = self.affine(z)
        return z if self.branch is None else z + self.branch(h)

    def follow(self, theta: Sequence[Tensor], momentum: float) -> None:
        assert self.ema is not None
        own = list(self.ema.parameters())
        low = dict(self.named_buffers(recurse=False))
        averages = [low.get(f"average_{i}", p) for i, p in enumerate(own)]
        targets = [t.to(a.dtype) for t, a in zip(theta, averages)]
        torch._foreach_lerp_(averages, targets, 1 - momentum)
        for p, average in zip(own, averages):
            if average is not p:
                p.copy_(average)


class Affine(nn.Module):
    """A scale and a shift for each channel, at first 1 and 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, z: Float[Tensor, "b *features"]) -> Float[Tensor, "b *features"]:
        if z.ndim <= 3:  # vectors and tokens have their width last
            return z * self.scale + self.shift
        view = (-1, *[1] * (z.ndim - 2))
        return z * self.scale.view(view) + self.shift.view(view)
