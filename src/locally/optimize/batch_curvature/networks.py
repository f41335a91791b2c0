"""The networks whose curvature and rates are measured: perceptrons, VGG-16 and wide residual networks."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def perceptron(*widths: int, seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def train_on_all(model: nn.Module, data: tuple[Tensor, Tensor], steps: int, lr: float = 0.5) -> float:
    """Gradient descent on the cross-entropy of all examples at once; returns it at the end."""
    parameters = list(model.parameters())
    for _ in range(steps):
        gradients = torch.autograd.grad(cross_entropy(model(data[0]), data[1]), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter.sub_(lr * gradient)
    with torch.no_grad():
        return float(cross_entropy(model(data[0]), data[1]))


def vgg16(classes: int = 100) -> nn.Sequential:
    """The sixteen-layer network for 32 x 32 images, without normalisation."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    head = [nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, classes)]
    model = nn.Sequential(*layers, nn.Flatten(), *head)
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.constant_(module.bias, 0.0)  # type: ignore[arg-type]
    return model


class WideResNet(nn.Module):
    """Pre-activation residual network of depth 6 k + 4 and the given width (arXiv 1605.07146)."""

    def __init__(self, depth: int, width: int, classes: int = 100) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = 16
        for stage, base in enumerate((16, 32, 64)):
            for i in range((depth - 4) // 6):
                blocks.append(Residual(channels, base * width, stride=2 if stage and i == 0 else 1))
                channels = base * width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.blocks(self.stem(images))).relu()
        return self.head(features.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(out)])
        self.first = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.norms[0](x).relu()
        skip = x if isinstance(self.skip, nn.Identity) else self.skip(active)
        return skip + self.second(self.norms[1](self.first(active)).relu())
