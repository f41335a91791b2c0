"""Numbers for what one sees in rows, columns and singular images.

The paper shows figures; these quantify them: how local an image is, which frequencies it holds and in which direction,
whether an output copies from elsewhere, whether it is written by the constants.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locally.checks import check_shape


def support(images: Float[Tensor, "... h w"]) -> Float[Tensor, "..."]:
    """Fraction of the pixels that an image is spread over, (sum v^2)^2 / (n sum v^4), in (0, 1].

    1 for a constant modulus, 4/9 for a plane wave along one axis, 1 / n for one pixel; NaN for zero.

    >>> support(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    tensor(0.5000)
    """
    v = images.flatten(-2)
    v = v / v.abs().amax(-1, keepdim=True)
    return v.square().sum(-1).square() / (v.shape[-1] * v.pow(4).sum(-1))


@dataclass(frozen=True)
class Band:
    """Where an image has its energy in the frequency plane.

    Attributes:
        frequency: mean modulus of the frequency, weighted by power, in cycles a pixel.
        bandwidth: its standard deviation.
        orientation: of the strongest change, in radians in [0, pi), 0 along a row.
        coherence: 0 without a preferred direction, 1 when all change is along one.
        constant_share: power at frequency 0 over all power.
    """

    frequency: Float[Tensor, "..."]
    bandwidth: Float[Tensor, "..."]
    orientation: Float[Tensor, "..."]
    coherence: Float[Tensor, "..."]
    constant_share: Float[Tensor, "..."]


def band(images: Float[Tensor, "... h w"]) -> Band:
    """Band and orientation from the power spectrum; the structure tensor is its second moment.

    >>> wave = torch.cos(2 * torch.pi * torch.arange(16) / 4).expand(16, 16)
    >>> found = band(wave)
    >>> round(float(found.frequency), 3), round(float(found.coherence), 3)
    (0.25, 1.0)
    """
    h, w = images.shape[-2:]
    power = torch.fft.fft2(images).abs().square()
    power = power / power.sum((-2, -1), keepdim=True)
    y = torch.fft.fftfreq(h, dtype=images.dtype, device=images.device)[:, None].expand(h, w)
    x = torch.fft.fftfreq(w, dtype=images.dtype, device=images.device)[None, :].expand(h, w)
    mean = lambda f: (power * f).sum((-2, -1))
    modulus = (x.square() + y.square()).sqrt()
    frequency = mean(modulus)
    xx, yy, xy = mean(x.square()), mean(y.square()), mean(x * y)
    anisotropy = ((xx - yy).square() + 4 * xy.square()).sqrt()
    return Band(
        frequency,
        (mean(modulus.square()) - frequency.square()).clamp_min(0).sqrt(),
        torch.remainder(torch.atan2(2 * xy, xx - yy) / 2, torch.pi),
        anisotropy / (xx + yy).clamp_min(torch.finfo(images.dtype).tiny),
        power[..., 0, 0],
    )


@dataclass(frozen=True)
class Gaze:
    """Where rows look. Attributes are in input pixels, one for each row.

    Attributes:
        centre: mean position (row, column) of the weights' moduli, (..., 2).
        copy_distance: from the row's own place to that centre: far for a network that copies from elsewhere.
        mean_distance: of the weights from the row's own place.
        spread: root mean square distance of the weights from their centre: small for one compact source.
    """

    centre: Float[Tensor, "... 2"]
    copy_distance: Float[Tensor, "..."]
    mean_distance: Float[Tensor, "..."]
    spread: Float[Tensor, "..."]


def gaze(rows: Float[Tensor, "... h w"], places: Float[Tensor, "... 2"]) -> Gaze:
    """Copy distance and compactness of rows whose outputs stand at `places`, (row, column) in input pixels.

    >>> row = torch.zeros(8, 8)
    >>> row[2, 7] = -3.0
    >>> gaze(row, torch.tensor([2.0, 2.0])).copy_distance
    tensor(5.)
    """
    check_shape("places", places, (*rows.shape[:-2], 2))
    h, w = rows.shape[-2:]
    weight = rows.abs()
    weight = weight / weight.sum((-2, -1), keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    y = torch.arange(h, dtype=rows.dtype, device=rows.device)[:, None]
    x = torch.arange(w, dtype=rows.dtype, device=rows.device)[None, :]
    mean = lambda f: (weight * f).sum((-2, -1))
    centre = torch.stack([mean(y), mean(x)], -1)
    squares = lambda at: (y - at[..., 0, None, None]).square() + (x - at[..., 1, None, None]).square()
    return Gaze(
        centre,
        (centre - places).norm(dim=-1),
        mean(squares(places).sqrt()),
        mean(squares(centre)).clamp_min(0).sqrt(),
    )


def template_share(residual: Float[Tensor, "..."], linear_part: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """|r_i| / (|r_i| + |F x|_i) for each output: near 1 where the network writes from memory. 0 where both are zero.

    >>> template_share(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 2.0]))
    tensor([0.7500, 0.0000])
    """
    r, linear = residual.abs(), linear_part.abs()
    return torch.where(r == 0, 0, r / (r + linear).clamp_min(torch.finfo(r.dtype).tiny))
