"""Networks so small that they are trained in place: one that classifies, one that upscales, one that fills a gap."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locally.tangent.interpreter.images import Patches, halved

HELD_OUT = 107  # bottom rows of each photograph, never trained on
GAP, SHIFT = 5, 8  # width of the gap, and how far to its left stands what belongs there


def train_classifier(X: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
    order = torch.Generator().manual_seed(seed)
    rows = [r for _ in range(epochs) for r in torch.randperm(len(X), generator=order).split(64)]
    fit(net, len(rows), 2e-3, lambda i: F.cross_entropy(net(X[rows[i]]), y[rows[i]]))
    return net


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def train_upscaler(photographs: list[Tensor], steps: int, seed: int, width: int = 12) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), Residual(width), Residual(width),
            nn.Conv2d(width, 4, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip
    patches = Patches(photographs, 24, HELD_OUT, seed)

    def loss(_: int) -> Tensor:
        sharp = patches.draw(8)
        return (net(halved(sharp)) - sharp).abs().mean()

    fit(net, steps, 4e-3, loss)
    return net


def torn(images: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Images with a black gap from column `left` on, and what the network is to make of them."""
    whole = images.clone()
    whole[..., left : left + GAP] = images[..., left - SHIFT : left - SHIFT + GAP]
    x = whole.clone()
    x[..., left : left + GAP] = 0
    return x, whole


class Correction(nn.Module):
    """x plus what convolutions make of it; the dilated one sees SHIFT pixels far."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=SHIFT, dilation=SHIFT),
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def train_inpainter(photographs: list[Tensor], steps: int, seed: int) -> Correction:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Correction()
    patches = Patches(photographs, 32, HELD_OUT, seed)

    def loss(_: int) -> Tensor:
        left = SHIFT + patches.corner(1, 32 - GAP - SHIFT)[1]
        x, whole = torn(patches.draw(16), left)
        error = (net(x) - whole).abs()
        return error.mean() + error[..., left : left + GAP].mean()

    fit(net, steps, 5e-3, loss)
    return net


def fit(net: nn.Module, steps: int, rate: float, loss: Callable[[int], Tensor]) -> None:
    """Adam with one cycle of the rate; leaves the network in evaluation mode."""
    optimizer = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for i in range(steps):
        optimizer.zero_grad()
        loss(i).backward()
        optimizer.step()
        schedule.step()
    net.eval()
