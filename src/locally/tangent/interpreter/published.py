"""Networks whose published weights people have, with the parameter names of those weights.

Classifiers of ImageNet (AlexNet, VGG, ResNet, DenseNet), super-resolution (EDSR, RCAN), image to image (CycleGAN).
Weights are read from safetensors files; a file that was written with pickle is to be converted by whoever trusts it.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_weights(net: nn.Module, path: Path | str, ignore: Sequence[str] = ()) -> nn.Module:
    """Fill `net` from a safetensors file and put it into evaluation mode; names starting with `ignore` are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no safetensors file, or its tensors are not those of the network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = {k: v for k, v in load_file(path).items() if not k.startswith(tuple(ignore))}
        net.load_state_dict(state)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of {type(net).__name__}: {error}") from error
    return net.eval()


# Classifiers ---------------------------------------------------------------------------------------------------------


class Standardised(nn.Module):
    """A classifier of ImageNet on pixels in [0, 1]: subtracts the channels' means and divides by their deviations."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("scale", 1 / torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x - self.mean) * self.scale)


class AlexNet(nn.Module):
    """Krizhevsky, arXiv 1404.5997, as its published weights have it: one column, no response normalisation."""

    def __init__(
        self, widths: Sequence[int] = (64, 192, 384, 256, 256), *, hidden: int = 4096, classes: int = 1000
    ) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.features = nn.Sequential(
            *(nn.Conv2d(3, a, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(b, c, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(c, d, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(d, e, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(36 * e, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


VGG19 = (2, 2, 4, 4, 4)


class VGG(nn.Module):
    """Simonyan & Zisserman, arXiv 1409.1556, without batch normalisation: `convolutions` in each of five groups."""

    def __init__(
        self, convolutions: Sequence[int] = VGG19, *, width: int = 64, hidden: int = 4096, classes: int = 1000
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        entry = 3
        for group, count in enumerate(convolutions):
            exit_ = width * min(2**group, 8)
            for _ in range(count):
                layers += [nn.Conv2d(entry, exit_, 3, padding=1), nn.ReLU()]
                entry = exit_
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(49 * entry, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(),
            nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions around a shortcut, the stride at the 3 x 3."""

    def __init__(self, entry: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(entry, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.downsample: nn.Sequential | None = None
        if stride > 1 or entry != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(entry, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(h)))))
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


RESNET152 = (3, 8, 36, 3)


class ResNet(nn.Module):
    """He et al., arXiv 1512.03385: `depths` bottleneck blocks in each of four groups."""

    def __init__(self, depths: Sequence[int] = RESNET152, *, width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        entry = width
        for group, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                blocks.append(Bottleneck(entry, width * 2**group, 2 if group and i == 0 else 1))
                entry = 4 * width * 2**group
            self.add_module(f"layer{group + 1}", nn.Sequential(*blocks))
        self.groups = len(depths)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(entry, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for group in range(self.groups):
            x = getattr(self, f"layer{group + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class DenseLayer(nn.Module):
    """All features so far, through 1 x 1 and 3 x 3 convolutions behind their norms, to `growth` more."""

    def __init__(self, entry: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(entry), nn.ReLU()
        self.conv1 = nn.Conv2d(entry, bottleneck, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(bottleneck), nn.ReLU()
        self.conv2 = nn.Conv2d(bottleneck, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.relu1(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu2(self.norm2(h)))], 1)


DENSENET121, DENSENET169, DENSENET201 = (6, 12, 24, 16), (6, 12, 32, 32), (6, 12, 48, 32)


class DenseNet(nn.Module):
    """Huang et al., arXiv 1608.06993: `depths` layers in each block, each layer adding `growth` channels.

    DenseNet161 has depths (6, 12, 36, 24), growth 48 and width 96. A transition between blocks halves the channels.
    """

    def __init__(
        self, depths: Sequence[int] = DENSENET121, *, growth: int = 32, width: int = 64, classes: int = 1000
    ) -> None:
        super().__init__()
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(3, width, 7, 2, 3, bias=False),
            norm0=nn.BatchNorm2d(width),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(3, 2, 1),
        )
        for block, depth in enumerate(depths, start=1):
            layers = (DenseLayer(width + i * growth, growth, 4 * growth) for i in range(depth))
            parts[f"denseblock{block}"] = nn.Sequential(
                OrderedDict((f"denselayer{i}", layer) for i, layer in enumerate(layers, start=1))
            )
            width += depth * growth
            if block < len(depths):
                parts[f"transition{block}"] = transition(width)
                width //= 2
        parts[f"norm{len(depths) + 1}"] = nn.BatchNorm2d(width)
        self.features = nn.Sequential(parts)
        self.relu, self.avgpool, self.classifier = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(width, classes)
        self.register_load_state_dict_pre_hook(current_names)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.relu(self.features(x))), 1))


def transition(width: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(width),
            relu=nn.ReLU(),
            conv=nn.Conv2d(width, width // 2, 1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )


def current_names(_net: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """Published files write norm.1 and conv.2 in dense layers, which was allowed for names of modules once."""
    for name in list(state):
        current = re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.(\d\.)", r"\1\2", name)
        state[current] = state.pop(name)


CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "alexnet": AlexNet, "vgg19": VGG, "resnet152": ResNet, "densenet121": DenseNet
}  # fmt: skip


# Image to image ------------------------------------------------------------------------------------------------------


class Upscaler(nn.Module):
    """What EDSR and RCAN share, for x4 on pixels in [0, 1]: a shortcut around `blocks`, then two doublings of the size.

    The mean is that of DIV2K.
    """

    def __init__(self, width: int, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", 255 * torch.tensor([0.4488, 0.4371, 0.4040])[:, None, None], persistent=False)
        self.head = nn.Sequential(same(3, width))
        self.body = nn.Sequential(*blocks, same(width, width))
        up = [m for _ in range(2) for m in (same(width, 4 * width), nn.PixelShuffle(2))]
        self.tail = nn.Sequential(nn.Sequential(*up), same(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(255 * x - self.mean)
        return (self.tail(x + self.body(x)) + self.mean) / 255


def same(entry: int, exit_: int) -> nn.Conv2d:
    """3 x 3, and the image keeps its size."""
    return nn.Conv2d(entry, exit_, 3, padding=1)


class Around(nn.Module):
    """What the layers make of x, added to it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class EDSR(Upscaler):
    """The baseline of Lim et al. (CVPR workshops 2017): residual blocks of two convolutions."""

    def __init__(self, width: int = 64, blocks: int = 16) -> None:
        super().__init__(width, (Around(same(width, width), nn.ReLU(), same(width, width)) for _ in range(blocks)))


class RCAN(Upscaler):
    """Zhang et al., arXiv 1807.02758: `groups` of `blocks` with attention to channels, a shortcut around each."""

    def __init__(self, width: int = 64, groups: int = 10, blocks: int = 20, *, reduction: int = 16) -> None:
        def block() -> nn.Module:
            return Around(same(width, width), nn.ReLU(), same(width, width), ChannelAttention(width, reduction))

        super().__init__(width, (Around(*(block() for _ in range(blocks)), same(width, width)) for _ in range(groups)))


class ChannelAttention(nn.Module):
    """Every channel times a gate that the means of all channels open."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_du = nn.Sequential(
            nn.Conv2d(width, width // reduction, 1), nn.ReLU(), nn.Conv2d(width // reduction, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(self.avg_pool(x))


class CycleGenerator(nn.Module):
    """The generator of CycleGAN (Zhu et al., arXiv 1703.10593) with `blocks` residual blocks, on pixels in [-1, 1]."""

    def __init__(self, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        self.model = nn.Sequential(*self._layers(width, blocks))

    @staticmethod
    def _layers(width: int, blocks: int) -> Iterator[nn.Module]:
        yield from (nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), nn.InstanceNorm2d(width), nn.ReLU())
        for w in (width, 2 * width):
            yield from (nn.Conv2d(w, 2 * w, 3, 2, 1), nn.InstanceNorm2d(2 * w), nn.ReLU())
        for _ in range(blocks):
            yield CycleBlock(4 * width)
        for w in (4 * width, 2 * width):
            yield from (nn.ConvTranspose2d(w, w // 2, 3, 2, 1, 1), nn.InstanceNorm2d(w // 2), nn.ReLU())
        yield from (nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class CycleBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)
