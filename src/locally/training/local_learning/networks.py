"""Residual and VGG networks as chains of stages: the units between which a network may be cut.

Every stage can make a fresh one of its own kind with other widths, from which auxiliary networks are built.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from locally.checks import check_choice, check_count
from locally.training.local_learning.chain import Chain
from locally.training.local_learning.initialization import reinitialize


@runtime_checkable
class Stage(Protocol):
    """What an auxiliary network needs to know of a stage whose architecture it repeats."""

    def like(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """A new stage of the same kind with weights of its own."""


class ConvStage(nn.Module):
    """3 x 3 convolution, batch normalisation, ReLU, and a 2 x 2 maximum where `pool` says so."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, *, kernel: int = 3, pool: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.pool = nn.Identity() if pool is None else pool

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return self.pool(F.relu(self.bn(self.conv(x))))

    def like(self, in_channels: int, out_channels: int, stride: int) -> "ConvStage":
        """A stage with the same kernel size, weights of its own and no pooling."""
        # the stride takes the place of the pooling
        return type(self)(in_channels, out_channels, stride, kernel=self.kernel)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, projected where width or size changes (He et al., 2016)."""

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _projection(in_channels, out_channels, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.downsample(x))

    def like(self, in_channels: int, out_channels: int, stride: int) -> "BasicBlock":
        """A block of the same class with weights of its own."""
        return type(self)(in_channels, out_channels, stride)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions around a shortcut; the stride is at the 3 x 3."""

    expansion = 4

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        inner = out_channels // self.expansion
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _projection(in_channels, out_channels, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.downsample(x))

    def like(self, in_channels: int, out_channels: int, stride: int) -> "Bottleneck":
        """A block of the same class with weights of its own."""
        return type(self)(in_channels, out_channels, stride)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def pooled_classifier(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def residual_network(
    depths: Sequence[int],
    widths: Sequence[int],
    *,
    block: Callable[[int, int, int], nn.Module] = BasicBlock,
    in_channels: int = 3,
    classes: int = 10,
    stem: ConvStage | None = None,
    generator: torch.Generator | None = None,
) -> Chain:
    """A residual network whose stages are its stem and its residual blocks.

    Args:
        depths, widths: residual blocks and channels of each group; every group but the first halves the image.
        block: called with (in_channels, out_channels, stride).
        stem: the first stage; default a 3 x 3 convolution to widths[0] channels.
        generator: draws the initial weights.

    Raises:
        ValueError: `depths` and `widths` differ in length or hold numbers below 1.
    """
    if len(depths) != len(widths) or not depths:
        raise ValueError(f"depths and widths must have one entry a group, got {list(depths)} and {list(widths)}")
    for name, numbers in (("depths", depths), ("widths", widths)):
        for number in numbers:
            check_count(name, number)
    check_count("in_channels", in_channels)
    check_count("classes", classes)
    stem = ConvStage(in_channels, widths[0]) if stem is None else stem
    stages: list[nn.Module] = [stem]
    entry = stem.bn.num_features
    for group, (depth, width) in enumerate(zip(depths, widths)):
        for i in range(depth):
            stages.append(block(entry, width, 2 if group > 0 and i == 0 else 1))
            entry = width
    return reinitialize(Chain(stages, pooled_classifier(entry, classes)), generator)


def cifar_resnet(
    depth: int = 32,
    *,
    width: int = 16,
    in_channels: int = 3,
    classes: int = 10,
    generator: torch.Generator | None = None,
) -> Chain:
    """ResNet-20, -32, -110, ... of 6 n + 2 layers for small images: 3 n + 1 stages.

    >>> len(cifar_resnet(32).stages)
    16
    """
    check_count("depth", depth, at_least=8)
    if depth % 6 != 2:
        raise ValueError(f"depth must be 6 n + 2 (20, 32, 44, 56, 110, ...), got {depth}")
    n = (depth - 2) // 6
    widths = [width, 2 * width, 4 * width]
    return residual_network([n] * 3, widths, in_channels=in_channels, classes=classes, generator=generator)


IMAGENET_RESNETS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def imagenet_resnet(
    depth: int = 50, *, in_channels: int = 3, classes: int = 1000, generator: torch.Generator | None = None
) -> Chain:
    """ResNet-18, -34, -50, -101 or -152 for images of about 224 x 224."""
    check_choice("depth", depth, tuple(IMAGENET_RESNETS))
    block, depths = IMAGENET_RESNETS[depth]
    stem = ConvStage(in_channels, 64, 2, kernel=7, pool=nn.MaxPool2d(3, 2, 1))
    widths = [64 * 2**group * block.expansion for group in range(4)]
    return residual_network(depths, widths, block=block, classes=classes, stem=stem, generator=generator)


VGG_WIDTHS = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


def vgg(depth: int = 19, *, in_channels: int = 3, classes: int = 10, generator: torch.Generator | None = None) -> Chain:
    """VGG-11, -13, -16 or -19 with batch normalisation and one linear layer after average pooling.

    A stage a convolution; the maximum over 2 x 2 belongs to the last convolution of each group.
    """
    check_choice("depth", depth, tuple(VGG_WIDTHS))
    check_count("in_channels", in_channels)
    check_count("classes", classes)
    groups = VGG_WIDTHS[depth]
    entries = [in_channels, *(width for group in groups for width in group)]
    last = {sum(len(g) for g in groups[: i + 1]) - 1 for i in range(len(groups))}
    stages = [
        ConvStage(a, b, pool=nn.MaxPool2d(2) if i in last else None) for i, (a, b) in enumerate(pairwise(entries))
    ]
    return reinitialize(Chain(stages, pooled_classifier(entries[-1], classes)), generator)
