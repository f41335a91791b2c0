"""The network: a backbone, a pre-feature layer, and two heads that start as one.

Source: arXiv 2301.01805, the parameterisation of embedding and membership; widths as in the public code of the same
group.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from locally.checks import check_count


class MLCNet(nn.Module):
    """x -> (z, c): the embedding, and the features whose cosines make the membership; both have rows of length one.

    Args:
        in_dim: features that enter the pre-feature layer: the input's, or the backbone's output.
        hidden_dim: width of the pre-feature layer.
        z_dim: width of both heads.
        backbone: applied first; none for features that are computed already.
        layers: linear layers before the heads, 1 or more; batch normalisation after the first.
        generator: draws the weights; torch's own by default.

    Raises:
        ValueError, TypeError: a width is not a positive integer.

    >>> net = MLCNet(in_dim=5, hidden_dim=16, z_dim=4).copy_feature_head_()
    >>> z, c = net(torch.ones(3, 5) * torch.arange(3)[:, None])
    >>> z.shape, torch.equal(z, c)
    (torch.Size([3, 4]), True)
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        z_dim: int,
        backbone: nn.Module | None = None,
        layers: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_dim", in_dim), ("hidden_dim", hidden_dim), ("z_dim", z_dim), ("layers", layers)):
            check_count(name, value)
        self.backbone = nn.Identity() if backbone is None else backbone
        parts: list[nn.Module] = [nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU()]
        for _ in range(layers - 1):
            parts += [nn.Linear(hidden_dim, hidden_dim), nn.ReLU()]
        self.pre_feature = nn.Sequential(*parts)
        self.feature_head = nn.Linear(hidden_dim, z_dim)
        self.cluster_head = nn.Linear(hidden_dim, z_dim)
        if generator is not None:
            for module in (self.pre_feature, self.feature_head, self.cluster_head):
                draw_weights_(module, generator)

    def forward(self, x: Float[Tensor, "n features"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        h = self.pre_feature(self.backbone(x))
        # lengths in single precision also where autocast made the heads' output shorter
        return F.normalize(self.feature_head(h).float(), dim=1), F.normalize(self.cluster_head(h).float(), dim=1)

    def copy_feature_head_(self) -> "MLCNet":
        """One-shot initialisation of the membership: P(CC') becomes P(ZZ') exactly."""
        self.cluster_head.load_state_dict(self.feature_head.state_dict())
        return self


class ResNet18(nn.Module):
    """The 18-layer residual network with the stem for small images: 3 x 3, stride 1, no pooling.

    Takes flat rows of channels x height x width numbers and gives `out_dim` = 8 `width` features.

    Args:
        image_shape: channels, height, width.
        width: channels of the first stage.
        generator: draws the weights; torch's own by default.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], width: int = 64, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_count("width", width)
        self.out_dim = 8 * width
        stages: list[nn.Module] = []
        channels = width
        for stage in range(4):
            for block in range(2):
                out = width << stage
                stages.append(_ResidualBlock(channels, out, stride=2 if stage and not block else 1))
                channels = out
        self.layers = nn.Sequential(
            nn.Unflatten(1, image_shape),
            _convolution(image_shape[0], width, 3, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=generator)

    def forward(self, x: Float[Tensor, "n features"]) -> Float[Tensor, "n d"]:
        return self.layers(x)


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(channels, out, 3, stride),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            _convolution(out, out, 3, 1),
            nn.BatchNorm2d(out),
        )
        same = stride == 1 and channels == out
        self.shortcut: Callable[[Tensor], Tensor] = (
            nn.Identity() if same else nn.Sequential(_convolution(channels, out, 1, stride), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _convolution(channels: int, out: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, size, stride=stride, padding=size // 2, bias=False)


def draw_weights_(module: nn.Module, generator: torch.Generator) -> None:
    """Uniform in +-1 / sqrt(fan in) for every linear layer: torch's default, from a generator of one's own."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
