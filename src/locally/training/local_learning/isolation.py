"""Training in gradient-isolated blocks: each block has a local loss, and no gradient crosses a border.

A training step runs block after block; the graph of each is freed before the next one runs, so that the activations of
one block and its auxiliary network are alive at a time instead of the whole network's.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from locally.checks import check_count, check_finite
from locally.training.local_learning.chain import Chain
from locally.training.local_learning.initialization import drawing_from

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """What a rule is told of the network: its stages, their output shapes without the batch, and the cuts."""

    chain: Chain
    input_shape: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]  # first stage of blocks 1, 2, ...
    classes: int
    loss: Loss
    generator: torch.Generator | None = None

    @property
    def n_blocks(self) -> int:
        """Blocks in all, the last one among them."""
        return len(self.starts) + 1

    def block(self, k: int) -> range:
        """Numbers of the stages of block k."""
        edges = [0, *self.starts, len(self.shapes)]
        return range(edges[k], edges[k + 1])


class Objective(nn.Module):
    """The local loss of one block: auxiliary network and criterion, thrown away after training."""

    def forward(
        self, h: Float[Tensor, "b *features"], y: Shaped[Tensor, "b *target"], x: Shaped[Tensor, "b *input"]
    ) -> Float[Tensor, ""]:
        """Loss of the block's output h for targets y; x is the network's input."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def after_backward(self) -> None:
        """Called when the block's gradients are there, before any optimizer step."""


@runtime_checkable
class Rule(Protocol):
    """How local losses are made: one `Objective` for each block but the last."""

    def default_starts(self, n_stages: int) -> Sequence[int]:
        """Where blocks begin when the user names no cuts."""

    def build(self, plan: Plan, block: int, stage: int) -> Objective:
        """The objective of `block`, which sees what `stage` puts out."""


class LocalLearner(nn.Module):
    """A network and its local losses; `forward` is the network alone.

    Args:
        net: a `Chain`, or a module that is the chain of its children (see `Chain.of`). It is trained in place.
        rule: makes the local losses, e.g. `locally.training.auxiliary_networks.AugLocal(depth=2)`.
        example: a batch of inputs, at least one, from which shapes are read.
        classes: how many outputs an auxiliary network has.
        cuts: as in `Chain.cut_points`; default the rule's, () or 1 for plain backpropagation.
        loss: of logits and targets, a scalar; default cross-entropy.
        generator: draws the auxiliary networks' weights.

    Attributes:
        chain: the network.
        objectives: one a block but the last.
        plan: shapes and cuts.

    Raises:
        TypeError: a stage or the network returns no tensor, or an auxiliary network cannot be drawn for a stage.
        ValueError: a number is out of range; cuts split what is no chain or ask for more blocks than stages; blocks
            share parameters; a block would overwrite its input.

    Source: arXiv 2402.17318, section 3 (gradient-isolated layers with local losses).

    >>> from locally.training.local_learning import LinearHeads, cifar_resnet
    >>> x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    >>> learner = LocalLearner(cifar_resnet(8), LinearHeads(), example=x, classes=10)
    >>> len(learner.local_step(x, y)), learner(x).shape
    (4, torch.Size([4, 10]))
    """

    def __init__(
        self,
        net: nn.Module,
        rule: Rule,
        *,
        example: Shaped[Tensor, "b *input"],
        classes: int,
        cuts: int | Sequence[int | str] | None = None,
        loss: Loss = F.cross_entropy,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must have default_starts() and build(), got {type(rule).__name__}")
        check_count("classes", classes)
        if example.ndim < 2 or not len(example):
            raise ValueError(f"example must be a batch of at least one input, got shape {tuple(example.shape)}")
        if example.is_floating_point():
            check_finite("example", example)
        chain = Chain.of(net, example)
        starts = chain.cut_points(rule.default_starts(len(chain.stages)) if cuts is None else cuts)
        chain.check_disjoint(starts)
        shapes = tuple(chain.shapes(example, starts))
        self.plan = Plan(chain, tuple(example.shape[1:]), shapes, starts, classes, loss, generator)
        self._net = (net,)  # a tuple: its modules are registered with the chain
        self.chain = chain
        self._blocks: list[Callable[[Tensor], Tensor]] = [
            nn.Sequential(*(chain.stages[i] for i in self.plan.block(k))) for k in range(self.plan.n_blocks)
        ]
        with drawing_from(generator):  # modules draw weights when they are made, before `reinitialize`
            objectives = [rule.build(self.plan, k, self.plan.block(k)[-1]) for k in range(self.plan.n_blocks - 1)]
        like = next(chain.parameters())
        self.objectives = nn.ModuleList(objectives).to(like.device, like.dtype)
        self._check_borders(example)

    def forward(self, x: Shaped[Tensor, "b *input"]) -> Shaped[Tensor, "..."]:
        return self.chain(x)

    def block_loss(self, k: int, h: Tensor, y: Tensor, x: Tensor) -> Float[Tensor, ""]:
        """Loss of block k on its output h: its own objective's, or the network's loss for the last block."""
        if k == self.plan.n_blocks - 1:
            return self.plan.loss(self.chain.head(h), y)
        return self.objectives[k](h, y, x)

    def block_parameters(self, k: int) -> list[nn.Parameter]:
        """What the loss of block k trains: its stages, and its auxiliary network or the head."""
        parts = [*(self.chain.stages[i] for i in self.plan.block(k))]
        parts.append(self.chain.head if k == self.plan.n_blocks - 1 else self.objectives[k])
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def trainable(self) -> Iterator[nn.Parameter]:
        """Parameters that require a gradient, those of auxiliary networks among them."""
        return (p for p in self.parameters() if p.requires_grad)

    def local_step(
        self,
        x: Shaped[Tensor, "b *input"],
        y: Shaped[Tensor, "b *target"],
        *,
        after_block: Callable[[int], None] | None = None,
        overlap: bool = False,
        amp: torch.dtype | None = None,
    ) -> Float[Tensor, " blocks"]:
        """Add the gradients of all local losses to `.grad`, block by block; returns the losses.

        Args:
            x, y: a batch; y as the loss takes it.
            after_block: called with k when block k has its gradients: to step its optimizer at once, to clip, or to
                average gradients over processes. A global clip would need all blocks.
            overlap: on a CUDA device, run the backward of block k beside the forward of block k + 1, on two streams.
                The activations of two blocks are then alive at a time. Elsewhere blocks run one after the other.
            amp: compute forward passes and losses under `torch.autocast` with this type, e.g. torch.bfloat16.

        The gradients are those of the summed losses with detached borders, whatever the schedule.
        """
        if len(x) != len(y):
            raise ValueError(f"x and y must have one entry a sample, got {len(x)} and {len(y)}")
        if overlap and x.is_cuda:
            from locally.training.local_learning.overlap import overlapped_step

            return overlapped_step(self, x, y, after_block, amp)
        losses = []
        h = x
        for k in range(self.plan.n_blocks):
            h = self.run_block(k, h, amp)
            losses.append(self.run_backward(k, h, y, x, amp))
            h = h.detach()
            self.finish_block(k, after_block)
        return torch.stack(losses)

    def run_block(self, k: int, h: Tensor, amp: torch.dtype | None = None) -> Tensor:
        """Output of block k for the output h of the block before, under autocast where `amp` names a type."""
        with torch.autocast(h.device.type, amp, enabled=amp is not None):
            return self._blocks[k](h)

    def run_backward(self, k: int, h: Tensor, y: Tensor, x: Tensor, amp: torch.dtype | None = None) -> Tensor:
        """Local loss of block k on its output h, with its gradients left in `.grad`; the graph is freed."""
        with torch.autocast(h.device.type, amp, enabled=amp is not None):
            loss = self.block_loss(k, h, y, x)
        loss.backward()
        return loss.detach()

    def finish_block(self, k: int, after_block: Callable[[int], None] | None) -> None:
        """To call once block k has its gradients: tells its objective, then calls `after_block(k)`."""
        if k < len(self.objectives):
            cast(Objective, self.objectives[k]).after_backward()
        if after_block is not None:
            after_block(k)

    def compile_blocks(self, **options: object) -> None:
        """`torch.compile` each block by itself; the backward between them keeps one graph from spanning the network."""
        self._blocks = [torch.compile(block, **options) for block in self._blocks]  # type: ignore[call-overload]

    def export(self) -> nn.Module:
        """A copy of the trained network without anything of the local losses."""
        return copy.deepcopy(self._net[0])

    @torch.no_grad()
    def accuracy(self, x: Shaped[Tensor, "n *input"], y: Shaped[Tensor, " n"], batch_size: int = 512) -> float:
        """Share of right classes in evaluation mode."""
        check_count("batch_size", batch_size)
        training = self.training
        self.eval()
        try:
            parts = zip(x.split(batch_size), y.split(batch_size))
            right = sum(int((self.chain(a).argmax(1) == b).sum()) for a, b in parts)
        finally:
            self.train(training)
        return right / len(y)

    @torch.no_grad()
    def _check_borders(self, example: Tensor) -> None:
        """An auxiliary network that overwrites what it reads would feed garbage to the next block."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            h = example.clone()
            for k, objective in enumerate(self.objectives):
                h = self._blocks[k](h)
                probe = h.clone()
                version = probe._version
                network = getattr(objective, "network", None)
                if network is not None:
                    try:
                        network(probe)
                    except RuntimeError as error:
                        seen = tuple(probe.shape)
                        raise ValueError(f"the auxiliary network of block {k} fails on {seen}: {error}") from error
                if probe._version != version:
                    raise ValueError(f"the auxiliary network of block {k} overwrites its input: use no in-place ReLU")
        finally:
            for module, training in modes.items():
                module.training = training
