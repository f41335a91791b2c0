"""Local losses that do without augmented auxiliary networks: linear heads, DGL, PredSim and InfoPro.

Sources: Belilovsky et al. 2019 and 2020 (greedy linear heads, DGL), Nokland & Eidnes 2019 (PredSim), Wang et al. 2021
(InfoPro); sizes and weights as arXiv 2402.17318 and 2407.05623 compare with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from locally.checks import check_between, check_choice, check_nonnegative
from locally.training.local_learning.initialization import reinitialize
from locally.training.local_learning.isolation import Loss, Objective, Plan


class HeadObjective(Objective):
    """Loss of what an auxiliary network predicts from the block's output."""

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(
        self, h: Float[Tensor, "b *features"], y: Shaped[Tensor, "b *target"], x: Shaped[Tensor, "b *input"]
    ) -> Float[Tensor, ""]:
        return self.loss(self.network(h), y)


class EveryStage:
    """Base of rules that cut between all stages where the user says nothing."""

    def default_starts(self, n_stages: int) -> Sequence[int]:
        """Every stage is a block."""
        return range(1, n_stages)


class CellMeans(torch.autograd.Function):
    """Average pooling to q x q cells, q a divisor of height and width, in the memory format of its input.

    Nothing is kept for the backward pass: PyTorch's own pooling keeps its input, which costs an activation where
    nothing else does. With channels last the gradient, and that of the ReLU before, take a tenth (one cell) to a sixth
    of the time that they take behind `mean`: each cell's share is divided before it is spread out, for one cell as a
    view without memory, and comes in the memory format of the input.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Float[Tensor, "b c h w"], q: int) -> Float[Tensor, "b c q q"]:
        *_, height, width = h.shape
        return h.mean((2, 3), keepdim=True) if q == 1 else F.avg_pool2d(h, (height // q, width // q))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        h, q = inputs
        ctx.size = h.shape[2:]
        ctx.cell = h.shape[2:].numel() // q**2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        share = gradients[0] / ctx.cell
        if share.shape[2:].numel() == 1:
            return share.expand(-1, -1, *ctx.size), None
        return F.interpolate(share, size=ctx.size, mode="nearest"), None


class Mean(nn.Module):
    """Average over all dimensions but batch and width: pixels of (b, c, h, w), tokens of (b, t, width)."""

    def forward(self, h: Float[Tensor, "b *features"]) -> Float[Tensor, "b width"]:
        if h.ndim == 3:
            return h.mean(1)
        if h.ndim == 4:
            return CellMeans.apply(h, 1).flatten(1)
        return h.flatten(2).mean(2) if h.ndim > 4 else h


class GridMean(nn.Module):
    """Average pooling to q x q, which keeps nothing for its backward pass where q divides the size."""

    def __init__(self, q: int) -> None:
        super().__init__()
        self.q = q

    def forward(self, h: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c q q"]:
        *_, height, width = h.shape
        if height % self.q or width % self.q:
            return F.adaptive_avg_pool2d(h, self.q)
        return h if height == width == self.q else CellMeans.apply(h, self.q)


class Pointwise(nn.Conv2d):
    """1 x 1 convolution without bias; on images that lie in memory channels last it is one product of matrices.

    Which takes half the time of the general convolution at the sizes of a local head.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)

    def forward(self, h: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        if not h.is_contiguous(memory_format=torch.channels_last):
            return super().forward(h)
        return F.linear(h.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


def width_of(shape: Sequence[int]) -> int:
    """Channels of an image, features of a vector or a token."""
    return shape[-1] if len(shape) == 2 else shape[0]


def image_shape(rule: str, shape: Sequence[int]) -> tuple[int, int]:
    """(channels, size) where the rule's head is made of 2-D convolutions."""
    if len(shape) != 3:
        raise ValueError(
            f"rule {rule} needs blocks that put out images (b, c, h, w), got features of shape {tuple(shape)}"
        )
    return shape[0], max(shape[1:])


@dataclass(frozen=True)
class LinearHeads(EveryStage):
    """Average over pixels or tokens and one linear layer: the shortest-sighted local loss."""

    def build(self, plan: Plan, block: int, stage: int) -> Objective:
        """Average and linear layer on what `stage` puts out."""
        head = nn.Sequential(Mean(), nn.Linear(width_of(plan.shapes[stage]), plan.classes))
        return HeadObjective(reinitialize(head, plan.generator), plan.loss)


@dataclass(frozen=True)
class DGL(EveryStage):
    """Decoupled greedy learning: pool to a quarter, three 1 x 1 convolutions, pool to 2 x 2, an MLP of two layers."""

    def build(self, plan: Plan, block: int, stage: int) -> Objective:
        """The head for a stage of images: 1 x 1 convolutions on a quarter of the size, then the perceptron."""
        c, size = image_shape("DGL", plan.shapes[stage])
        quarter = ceil(size / 4)
        layers: list[nn.Module] = [GridMean(quarter)]
        for _ in range(3):
            layers += [Pointwise(c, c), nn.BatchNorm2d(c), nn.ReLU()]
        side = min(quarter, 2)
        layers += [GridMean(side), nn.Flatten()]
        features = c * side**2
        for _ in range(2):
            layers += [nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()]
        layers.append(nn.Linear(features, plan.classes))
        return HeadObjective(reinitialize(nn.Sequential(*layers), plan.generator), plan.loss)


@dataclass(frozen=True)
class PredSim(EveryStage):
    """`weight` times the mismatch of similarities plus (1 - weight) times the prediction loss.

    Similarities are cosines between centred features of two samples, compared with those of their one-hot targets.
    """

    weight: float = 0.99

    def __post_init__(self) -> None:
        check_between("weight", self.weight, 0, 1)

    def build(self, plan: Plan, block: int, stage: int) -> Objective:
        """Both losses on what `stage` puts out."""
        return PredSimObjective(self.weight, plan, plan.shapes[stage])


class PredSimObjective(Objective):
    def __init__(self, weight: float, plan: Plan, shape: Sequence[int]) -> None:
        super().__init__()
        c, size = image_shape("PredSim", shape)
        side = min(shape[1:])
        while side > 1 and c * side**2 > 512:
            side -= 1
        pool = GridMean(side) if side < size else nn.Identity()
        head = nn.Sequential(pool, nn.Flatten(), nn.Linear(c * side**2, plan.classes))
        self.network = reinitialize(head, plan.generator)
        self.similarity = reinitialize(nn.Conv2d(c, c, 3, padding=1, bias=False), plan.generator)
        self.weight, self.loss, self.classes = weight, plan.loss, plan.classes

    def forward(
        self, h: Float[Tensor, "b c h w"], y: Int[Tensor, " b"], x: Shaped[Tensor, "b *input"]
    ) -> Float[Tensor, ""]:
        onehot = F.one_hot(y, self.classes).to(h.dtype)
        mismatch = F.mse_loss(similarity_matrix(self.similarity(h)), similarity_matrix(onehot))
        return self.weight * mismatch + (1 - self.weight) * self.loss(self.network(h), y)


def similarity_matrix(features: Float[Tensor, "b *features"]) -> Float[Tensor, "b b"]:
    """Cosines between samples' centred features in [-1, 1]; of images with more than 3 channels, each channel's spread.

    Source: Nokland & Eidnes 2019, similarity matching loss.

    >>> similarity_matrix(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).round(decimals=3).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    if features.ndim == 4:
        images = features.flatten(2)
        features = images.std(2) if features.shape[1] > 3 and images.shape[2] > 1 else images.flatten(1)
    else:
        features = features.flatten(1)
    centred = features - features.mean(1, keepdim=True)
    unit = F.normalize(centred, dim=1)
    return (unit @ unit.T).clamp(-1, 1)


INFOPRO_HEADS = ("1c2f", "2c2f")


@dataclass(frozen=True)
class InfoPro(EveryStage):
    """Reconstruction of the input image plus prediction, weights moving from the first block's to the last one's.

    Args:
        reconstruction, prediction: (first, last) weights, linear in the block's number; the defaults are ResNet-32's.
        head: "1c2f" or "2c2f", one or two 3 x 3 convolutions, then two linear layers.
        mean, std: of the channels by which images were normalised; reconstructed are pixels in [0, 1].
        coefficients: "block", or "stage" for the numbering of the authors' code for residual networks, where the
            weight moves by how often the image was halved before, over the number of blocks less two.
    """

    reconstruction: tuple[float, float] = (5.0, 0.2)
    prediction: tuple[float, float] = (0.05, 0.5)
    head: str = "1c2f"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    coefficients: str = "block"

    def __post_init__(self) -> None:
        for name in ("reconstruction", "prediction"):
            for number in getattr(self, name):
                check_nonnegative(name, number)
        check_choice("head", self.head, INFOPRO_HEADS)
        check_choice("coefficients", self.coefficients, ("block", "stage"))
        if len(self.mean) != len(self.std) or any(not s > 0 for s in self.std):
            raise ValueError(f"mean and std must have one entry a channel, std positive, got {self.mean}, {self.std}")

    def build(self, plan: Plan, block: int, stage: int) -> Objective:
        """Reconstruction and prediction from `stage`, with the weights that are due at this block."""
        first, last = zip(self.reconstruction, self.prediction)
        r = self._progress(plan, block, stage)
        weights = [a * (1 - r) + b * r for a, b in zip(first, last)]
        return InfoProObjective(self, weights[0], weights[1], plan, stage)

    def _progress(self, plan: Plan, block: int, stage: int) -> float:
        if plan.n_blocks <= 2:
            return 0.0
        if self.coefficients == "block":
            return block / (plan.n_blocks - 2)
        sizes = [max(shape[1:]) for shape in plan.shapes[: stage + 1]]
        return len(set(sizes)) / (plan.n_blocks - 2)


class InfoProObjective(Objective):
    mean: Tensor
    std: Tensor

    def __init__(self, rule: InfoPro, reconstruction: float, prediction: float, plan: Plan, stage: int) -> None:
        super().__init__()
        c, _ = image_shape("InfoPro", plan.shapes[stage])
        colours, *size = plan.input_shape
        if len(size) != 2 or len(rule.mean) not in (1, colours):
            raise ValueError(f"rule InfoPro needs images with {len(rule.mean)} channels, got inputs {plan.input_shape}")
        self.reconstruction, self.prediction, self.loss = reconstruction, prediction, plan.loss
        widest = max(width_of(shape) for shape in plan.shapes)
        self.decoder = reinitialize(_decoder(c, colours, size), plan.generator)
        self.network = reinitialize(_convolutional_head(rule.head, c, widest, plan.classes), plan.generator)
        self.register_buffer("mean", torch.tensor(rule.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(rule.std).view(-1, 1, 1), persistent=False)

    def forward(
        self, h: Float[Tensor, "b c h w"], y: Shaped[Tensor, "b *target"], x: Float[Tensor, "b colours height width"]
    ) -> Float[Tensor, ""]:
        image = (x * self.std + self.mean).clamp(0, 1)
        # of logits: the same loss as after a sigmoid, safe in low precision
        mismatch = F.binary_cross_entropy_with_logits(self.decoder(h), image)
        return self.reconstruction * mismatch + self.prediction * self.loss(self.network(h), y)


def _decoder(c: int, colours: int, size: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(
        nn.Upsample(tuple(size), mode="bilinear", align_corners=True),
        nn.Conv2d(c, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, colours, 3, padding=1),
    )


def _convolutional_head(kind: str, c: int, widest: int, classes: int) -> nn.Sequential:
    # twice the channels at half the size, but no more channels than the network has
    width, stride = (2 * c, 2) if 2 * c <= widest else (c, 1)
    layers: list[nn.Module] = []
    for i in range(int(kind[0])):
        entry, step = (c, stride) if i == 0 else (width, 1)
        layers += [nn.Conv2d(entry, width, 3, step, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [Mean(), nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, classes)]
    return nn.Sequential(*layers)
