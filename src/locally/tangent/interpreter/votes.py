"""Votes of pixels and constants on one output, and the same behind the interface that Captum's methods have."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locally.tangent.interpreter.replay import Constant


@dataclass(frozen=True)
class Votes:
    """score = pixels.sum() + bias for each example, and bias = sum of all maps.

    Attributes:
        pixels: (N, *shape), weight times value of each input.
        bias: (N,), what all constants contribute.
        score: (N,), the output that is voted on.
        constants: each constant with its votes (N, *shape of the value that it is added to).
    """

    pixels: Float[Tensor, "n ..."]
    bias: Float[Tensor, " n"]
    score: Float[Tensor, " n"]
    constants: tuple[tuple[Constant, Tensor], ...]

    def by_layer(self) -> dict[str, Float[Tensor, " n"]]:
        """The constants' votes by the path of their submodule; they add up to `bias`."""
        totals: dict[str, Tensor] = {}
        for constant, votes in self.constants:
            totals[constant.path] = totals.get(constant.path, 0) + votes.flatten(1).sum(1)
        return totals

    def bias_image(self) -> tuple[Float[Tensor, "n h w"], Float[Tensor, " n"]]:
        """The constants' votes on the input's grid, and the sum of those without a place in it, such as after pooling
        over the image.

        Each position of a coarser or finer map gives its vote to the pixels that it covers, by area: no vote is lost.

        Raises:
            ValueError: the inputs are not images (N, C, H, W).
        """
        if self.pixels.ndim != 4:
            raise ValueError(f"votes must be on images (N, C, H, W), got {tuple(self.pixels.shape)}")
        image = torch.zeros_like(self.pixels[:, 0])
        rest = torch.zeros_like(self.bias)
        for _, votes in self.constants:
            if votes.ndim != 4 or votes.shape[-1] * votes.shape[-2] == 1:
                rest = rest + votes.flatten(1).sum(1)
                continue
            rows, columns = (covering(votes, old, new) for old, new in zip(votes.shape[-2:], image.shape[-2:]))
            image = image + rows @ votes.sum(1) @ columns.T
        return image, rest

    def image(self) -> Float[Tensor, "n h w"]:
        """Votes of pixels, over channels, and of the constants in their place."""
        return self.pixels.sum(1) + self.bias_image()[0]


def covering(like: Tensor, old: int, new: int) -> Float[Tensor, "new old"]:
    """The fraction of each of `old` equal intervals that lies in each of `new`; columns add up to 1."""
    start = torch.arange(new, dtype=like.dtype, device=like.device)[:, None] / new
    at = torch.arange(old, dtype=like.dtype, device=like.device)[None, :] / old
    overlap = torch.minimum(start + 1 / new, at + 1 / old) - torch.maximum(start, at)
    return overlap.clamp_min(0) * old


class PixelVotes:
    """Votes of the pixels as attributions, with the interface of Captum's methods.

    For ReLU networks they are input x gradient.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    >>> PixelVotes(net).attribute(torch.rand(2, 2, 3), target=1).shape
    torch.Size([2, 2, 3])
    """

    def __init__(self, model: nn.Module, **options: object) -> None:
        """`options` are those of `LinearInterpreter`."""
        self.model, self.options = model, options

    def attribute(self, inputs: Float[Tensor, "n ..."], target: int | Tensor | None = None) -> Float[Tensor, "n ..."]:
        """Votes on output `target`, default the largest: the shape of `inputs`."""
        from locally.tangent.interpreter.system import LinearInterpreter

        scope = LinearInterpreter(self.model, inputs, **self.options)  # type: ignore[arg-type]
        return scope.rmatvec(scope._targets(target)) * scope.x
