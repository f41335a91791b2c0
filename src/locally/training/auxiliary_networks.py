"""AugLocal: local learning whose auxiliary networks are built like the layers that follow.

Each block's auxiliary network repeats, with weights of its own, the architecture of a few later stages, chosen evenly
up to the last; there are fewer of them the nearer a block is to the output. Source: arXiv 2402.17318, section 4.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2

from torch import nn

from locally.checks import check_between, check_choice, check_count, check_positive
from locally.training.local_learning.initialization import CONVOLUTIONS, reinitialize
from locally.training.local_learning.isolation import Objective, Plan
from locally.training.local_learning.networks import Stage
from locally.training.local_learning.rules import HeadObjective, Mean, width_of

__all__ = ["AugLocal", "pyramidal_depths", "select_stages"]

POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d)

BlockFactory = Callable[[nn.Module, int, int, int], nn.Module]


@dataclass(frozen=True, kw_only=True)
class AugLocal:
    """Auxiliary networks of up to `depth` stages, uniformly selected, with pyramidal depth.

    Args:
        depth: stages of the first auxiliary network, d >= 1.
        tau: how far depth falls towards `min_depth` at the last one, in [0, 1]; 0 keeps it constant.
        min_depth: d_min, at most `depth`.
        widen: factor on the auxiliary networks' widths.
        selection: "uniform" (the paper's), or its ablations "sequential", the next stages, and "repeat", the block's
            own last stage again and again.
        downsample: the stride halves the image when widths have doubled ("width", as the authors' code) or when the
            network's own images have halved ("size", for networks such as VGG that halve without widening).
        block_factory: called with (stage, in_channels, out_channels, stride), returns a fresh stage; default: the
            stage's own `like`, or else a copy whose first layer is made anew where the width before it differs.

    Without cuts a network is cut between all stages but its last `depth` + 1, which form the last block.

    Raises:
        ValueError: a number or word is out of range.

    Source: arXiv 2402.17318, equations 4 and 5.

    >>> import torch
    >>> from locally.training.local_learning import LocalLearner, cifar_resnet
    >>> x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    >>> learner = LocalLearner(cifar_resnet(20), AugLocal(depth=2), example=x, classes=10)
    >>> len(learner.objectives), [len(o.network) - 2 for o in learner.objectives]
    (7, [2, 2, 2, 2, 2, 2, 2])
    >>> learner.local_step(x, y).shape
    torch.Size([8])
    """

    depth: int = 2
    tau: float = 0.5
    min_depth: int = 1
    widen: float = 1.0
    selection: str = "uniform"
    downsample: str = "width"
    block_factory: BlockFactory | None = None

    def __post_init__(self) -> None:
        check_count("depth", self.depth)
        check_count("min_depth", self.min_depth)
        if self.min_depth > self.depth:
            raise ValueError(f"min_depth must be at most depth = {self.depth}, got {self.min_depth}")
        check_between("tau", self.tau, 0, 1)
        check_positive("widen", self.widen)
        check_choice("selection", self.selection, ("uniform", "sequential", "repeat"))
        check_choice("downsample", self.downsample, ("width", "size"))

    def default_starts(self, n_stages: int) -> Sequence[int]:
        """Every stage is a block but the last depth + 1, which form one."""
        return range(1, max(n_stages - self.depth, 1))

    def build(self, plan: Plan, block: int, stage: int) -> Objective:
        """Auxiliary network and head for this block, with the stages that `selection` names; arXiv 2402.17318."""
        depth = pyramidal_depths(self.depth, plan.n_blocks, tau=self.tau, min_depth=self.min_depth)[block]
        selected = select_stages(stage, len(plan.shapes), depth, selection=self.selection)
        network = self._network(plan, stage, selected)
        return HeadObjective(reinitialize(network, plan.generator), plan.loss)

    def _network(self, plan: Plan, stage: int, selected: Sequence[int]) -> nn.Sequential:
        shape = plan.shapes[stage]
        width = width_of(shape)
        strides = self._strides(plan, stage, selected)
        layers: list[nn.Module] = []
        for index, stride in zip(selected, strides):
            out = max(round(self.widen * width_of(plan.shapes[index])), 1)
            layers.append(self._fresh(plan, index, width, out, stride))
            width = out
        layers.append(Mean())
        if len(selected) <= 1 and len(shape) != 2:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.Linear(width, plan.classes))
        return nn.Sequential(*layers)

    def _strides(self, plan: Plan, stage: int, selected: Sequence[int]) -> list[int]:
        if len(plan.shapes[stage]) != 3:
            return [1] * len(selected)
        halvings, strides, previous = 0.0, [], plan.shapes[stage]
        for index in selected:
            shape = plan.shapes[index]
            halvings += log2(shape[0] / previous[0]) if self.downsample == "width" else log2(previous[1] / shape[1])
            strides.append(2 if halvings >= 1 else 1)  # what is left over is halved at the next stage
            halvings -= strides[-1] - 1
            previous = shape
        return strides

    def _fresh(self, plan: Plan, index: int, entry: int, out: int, stride: int) -> nn.Module:
        stage = plan.chain.stages[index]
        if self.block_factory is not None:
            return self.block_factory(stage, entry, out, stride)
        if isinstance(stage, Stage):
            return stage.like(entry, out, stride)
        if out != width_of(plan.shapes[index]):
            raise ValueError(f"widen needs a block_factory for stage {index}, {type(stage).__name__}")
        before = plan.shapes[index - 1] if index else plan.input_shape
        return adapted_copy(stage, width_of(before), entry, stride, f"stage {index}")


def pyramidal_depths(depth: int, n_blocks: int, *, tau: float = 0.5, min_depth: int = 1) -> list[int]:
    """Depth of each auxiliary network: round((1 - r_l) d + r_l d_min) with r_l = tau l / (K - 2), l = 0 .. K - 2.

    Args:
        depth: d, at least 1.
        n_blocks: K, local modules including the last, which has no auxiliary network.
        tau: in [0, 1].
        min_depth: d_min, in [1, depth].

    >>> pyramidal_depths(3, 13)
    [3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2]
    """
    check_count("depth", depth)
    check_count("n_blocks", n_blocks)
    check_between("tau", tau, 0, 1)
    falls = [tau * block / max(n_blocks - 2, 1) for block in range(n_blocks - 1)]
    return [max(1, round((1 - r) * depth + r * min_depth)) for r in falls]


def select_stages(stage: int, n_stages: int, depth: int, *, selection: str = "uniform") -> list[int]:
    """The stages that the auxiliary network after `stage` repeats: l + (L - 1 - l) i / d, rounded, i = 1 .. d.

    Args:
        stage: l, 0-based, below n_stages - 1.
        n_stages: L.
        depth: d; all later stages where there are no more than that.
        selection: "uniform", "sequential" or "repeat".

    >>> select_stages(0, 16, 3), select_stages(0, 16, 3, selection="sequential")
    ([5, 10, 15], [1, 2, 3])
    """
    check_count("depth", depth)
    check_between("stage", stage, 0, n_stages - 1)
    check_choice("selection", selection, ("uniform", "sequential", "repeat"))
    later = n_stages - 1 - stage
    depth = min(depth, later)
    if selection == "repeat":
        return [stage] * depth
    if selection == "sequential" or depth == later:
        return list(range(stage + 1, stage + 1 + depth))
    return [round(stage + later / depth * i) for i in range(1, depth + 1)]


def adapted_copy(stage: nn.Module, was: int, entry: int, stride: int, name: str) -> nn.Module:
    """A copy of any stage for `entry` instead of `was` features before it; weights are drawn by the caller.

    Raises:
        TypeError: no single convolution or linear layer reads the input, and so shows where to change width and stride.
    """
    fresh = copy.deepcopy(stage)
    if any(isinstance(part, POOLS) for part in fresh.modules()):
        stride = 1  # the pooling halves the image
    readers = [(path, part) for path, part in fresh.named_modules() if _width_before(part) == was]
    if len(readers) != 1:
        if entry == was and stride == 1:
            return fresh
        raise TypeError(
            f"{name} ({type(stage).__name__}) has no single convolution or linear layer that reads its input:"
            " pass AugLocal a block_factory"
        )
    ((path, first),) = readers
    if entry == was and stride == _stride(first):
        return fresh
    replacement = _remade(first, entry, stride)
    if not path:
        return replacement
    parent, _, leaf = path.rpartition(".")
    setattr(fresh.get_submodule(parent), leaf, replacement)
    return fresh


def _width_before(part: nn.Module) -> int | None:
    if isinstance(part, nn.Linear):
        return part.in_features
    return part.in_channels if isinstance(part, CONVOLUTIONS) else None


def _stride(part: nn.Module) -> int:
    return part.stride[0] if isinstance(part, CONVOLUTIONS) else 1


def _remade(first: nn.Module, entry: int, stride: int) -> nn.Module:
    bias = first.bias is not None
    if isinstance(first, nn.Linear):
        return nn.Linear(entry, first.out_features, bias=bias, device=first.weight.device, dtype=first.weight.dtype)
    assert isinstance(first, CONVOLUTIONS)
    if first.groups > 1:
        raise TypeError(f"a convolution of {first.groups} groups has no obvious counterpart: pass a block_factory")
    remade = type(first)(
        entry,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        stride,
        first.padding,  # type: ignore[arg-type]
        first.dilation,  # type: ignore[arg-type]
        bias=bias,
        padding_mode=first.padding_mode,
    )
    return remade.to(first.weight)
