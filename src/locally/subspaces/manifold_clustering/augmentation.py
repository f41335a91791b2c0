"""Random views of a sample, on the device of the batch: jitter for tables, affine maps and crops for images.

A view is any callable (x, generator) -> x of the same shape; rows are flat samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from locally.checks import check_between, check_nonnegative, check_positive

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Jitter:
    """Gaussian noise of standard deviation `scale` on every feature.

    >>> Jitter(0.0)(torch.ones(1, 2), torch.Generator())
    tensor([[1., 1.]])
    """

    scale: float

    def __post_init__(self) -> None:
        check_nonnegative("scale", self.scale)

    def __call__(self, x: Float[Tensor, "n features"], generator: torch.Generator) -> Float[Tensor, "n features"]:
        return x + self.scale * _normal(x.shape, x, generator)

    @classmethod
    def among_neighbours(
        cls, X: Float[ndarray, "n features"], fraction: float = 0.5, neighbours: int = 5, sample: int = 2000
    ) -> "Jitter":
        """Noise whose length is `fraction` of the median distance to the `neighbours`-th nearest sample.

        Args:
            X: the data; `sample` evenly spaced rows stand for more.
            fraction: non-negative.
            neighbours: at least 1; fewer where there are fewer samples.
        """
        from sklearn.neighbors import NearestNeighbors

        check_nonnegative("fraction", fraction)
        rows = X[np.linspace(0, len(X) - 1, min(len(X), sample)).astype(int)]
        count = min(neighbours, len(rows) - 1)
        if count < 1:
            return cls(0.0)
        distances = NearestNeighbors(n_neighbors=count).fit(rows).kneighbors()[0][:, -1]
        return cls(fraction * float(np.median(distances)) / math.sqrt(X.shape[1]))


@dataclass(frozen=True)
class RandomAffine:
    """Rotation, scaling, shear and shift of images, and pixel noise.

    Args:
        image_shape: channels, height, width.
        rotation: largest angle, radians.
        scale: largest relative change of size, in [0, 1).
        shear: largest shear.
        shift: largest shift, pixels.
        noise: standard deviation of Gaussian noise on every pixel.
    """

    image_shape: tuple[int, int, int]
    rotation: float = 0.26
    scale: float = 0.15
    shear: float = 0.2
    shift: float = 1.0
    noise: float = 0.05

    def __post_init__(self) -> None:
        for name in ("rotation", "shear", "shift", "noise"):
            check_nonnegative(name, getattr(self, name))
        check_between("scale", self.scale, 0, 0.99)

    def __call__(self, x: Float[Tensor, "n features"], generator: torch.Generator) -> Float[Tensor, "n features"]:
        images = _as_images(x, self.image_shape)
        n, _, height, width = images.shape
        angle, size, shear, down, right = (2 * torch.rand(5, n, device=x.device, generator=generator) - 1).unbind()
        angle, shear, size = self.rotation * angle, self.shear * shear, 1 + self.scale * size
        cos, sin = angle.cos(), angle.sin()
        rows = [
            torch.stack([cos, shear * cos - sin, 2 * self.shift / width * right]),
            torch.stack([sin, shear * sin + cos, 2 * self.shift / height * down]),
        ]
        theta = torch.stack(rows).permute(2, 0, 1)  # (n, 2, 3), from places in the view to places in the image
        theta[:, :, :2] /= size[:, None, None]
        view = _resample(images, theta.to(x.dtype)).flatten(1)
        return view.add_(_normal(view.shape, view, generator), alpha=self.noise) if self.noise else view


@dataclass(frozen=True)
class CropAndColour:
    """Views for photographs: random resized crop, flip, colour jitter, grey.

    Args:
        image_shape: channels, height, width; colour changes need three channels with values in [0, 1].
        area: smallest share of the image that a crop keeps, in (0, 1].
        brightness, contrast, saturation: largest relative changes, in [0, 1].
        hue: largest turn of the hue, in full turns, as a rotation in the YIQ plane.
        jitter: probability of any colour change.
        grey: probability of losing colour.
    """

    image_shape: tuple[int, int, int]
    area: float = 0.08
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter: float = 0.8
    grey: float = 0.2

    def __post_init__(self) -> None:
        check_positive("area", self.area)
        for name in ("area", "brightness", "contrast", "saturation", "hue", "jitter", "grey"):
            check_between(name, getattr(self, name), 0, 1)

    def __call__(self, x: Float[Tensor, "n features"], generator: torch.Generator) -> Float[Tensor, "n features"]:
        images = self._crop(_as_images(x, self.image_shape), generator)
        return (self._colour(images, generator) if images.shape[1] == 3 else images).flatten(1)

    def _crop(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n = len(images)
        area, ratio, across, down, flip = torch.rand(5, n, device=images.device, generator=generator).unbind()
        area = self.area + (1 - self.area) * area
        ratio = torch.exp((2 * ratio - 1) * math.log(4 / 3))
        wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        theta = torch.zeros(n, 2, 3, device=images.device, dtype=images.dtype)
        theta[:, 0, 0] = torch.where(flip < 0.5, wide, -wide)
        theta[:, 1, 1] = high
        theta[:, 0, 2] = (2 * across - 1) * (1 - wide)
        theta[:, 1, 2] = (2 * down - 1) * (1 - high)
        return _resample(images, theta)

    def _colour(self, images: Tensor, generator: torch.Generator) -> Tensor:
        draws = torch.rand(6, len(images), 1, 1, 1, device=images.device, generator=generator).to(images.dtype)
        brightness, contrast, saturation = (
            1 + limit * (2 * draw - 1)
            for limit, draw in zip((self.brightness, self.contrast, self.saturation), draws[:3])
        )
        changed = (images * brightness).clamp(0, 1)
        mean = _luma(changed).mean((2, 3), keepdim=True)
        changed = (mean + (changed - mean) * contrast).clamp(0, 1)
        grey = _luma(changed)
        changed = (grey + (changed - grey) * saturation).clamp(0, 1)
        changed = self._turn_hue(changed, 2 * math.pi * self.hue * (2 * draws[3] - 1)).clamp(0, 1)
        changed = torch.where(draws[4] < self.jitter, changed, images)
        return torch.where(draws[5] < self.grey, _luma(changed).expand_as(changed), changed)

    @staticmethod
    def _turn_hue(images: Tensor, angle: Tensor) -> Tensor:
        to_yiq = images.new_tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
        y, i, q = torch.einsum("ab,nbhw->anhw", to_yiq, images)
        cos, sin = angle[:, 0].cos(), angle[:, 0].sin()
        turned = torch.stack([y, cos * i - sin * q, sin * i + cos * q])
        return torch.einsum("ab,bnhw->nahw", torch.linalg.inv(to_yiq), turned)


def _as_images(x: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    if x.shape[1] != math.prod(image_shape):
        raise ValueError(f"x must have {math.prod(image_shape)} features for images {image_shape}, got {x.shape[1]}")
    return x.unflatten(1, image_shape)


def _resample(images: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _luma(images: Tensor) -> Tensor:
    weights = images.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return (images * weights).sum(1, keepdim=True)


def _normal(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
