"""Linearising more than the head: gradient features of the last layers beside the frozen ones.

The proxy w.phi(x; v) is linear in its head w alone. Linearised in further parameters v as well, around an initial head
w0, it gains the features d(w0.phi)/dv; the Gram matrix of all features is the empirical tangent kernel of the network
restricted to w and v, as `locally.tangent.kernel.empirical_ntk` computes it. They are differentiable in the tokens,
so that the closed forms and the design loop work on them unchanged.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from locally.checks import check_count, check_finite
from locally.tangent.linearization import select_parameters


class TangentFeatures(nn.Module):
    """[phi(x), R d(w0.phi(x))/dv]: features of a model and a random projection R of its gradients.

    The projection has variance 1 / dimension, so that the kernel is right in expectation and the head's system small.
    A call costs about three of the model's and O(dimension |v|) for each sequence.

    Args:
        model: as for `BIBDesigner`, a module in eval mode.
        parameters: names as in `model.named_parameters()`, such as those of the last layers.
        head: w0 (p,), such as `LinearizedHead.w` of the model's own features.
        dimension: of the projection, at least 1; None takes every coordinate of v, where these are few.
        generator: of the projection.

    Raises:
        ValueError: a name is unknown, or an argument is out of range.

    >>> from locally.design.bidirectional import MaskedLM
    >>> model = MaskedLM(4, width=8, hidden=8).eval()
    >>> draws = torch.Generator().manual_seed(0)
    >>> tangent = TangentFeatures(model, ["blocks.1.out.weight"], torch.ones(8), 16, generator=draws)
    >>> tangent(torch.eye(4).expand(3, 4, 4)).shape
    torch.Size([3, 24])
    """

    head: Tensor
    directions: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[str],
        head: Float[Tensor, " p"],
        dimension: int | None = 64,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(getattr(model, "kmer", None), int):
            raise TypeError(f"model must have an integer attribute kmer, got {type(model).__name__}")
        check_finite("head", head)
        self.names = select_parameters(model, parameters)
        self.model, self.kmer = model, model.kmer
        own = dict(model.named_parameters())
        size = sum(own[name].numel() for name in self.names)
        like = own[self.names[0]]
        directions = None
        if dimension is not None:
            check_count("dimension", dimension)
            directions = torch.randn(dimension, size, generator=generator, dtype=like.dtype) / dimension**0.5
            directions = directions.to(like.device)
        self.register_buffer("directions", directions)
        self.register_buffer("head", head.detach().to(like.device, like.dtype))
        self.eval()

    def forward(self, tokens: Float[Tensor, "sequences positions vocabulary"]) -> Float[Tensor, "sequences features"]:
        own = dict(self.model.named_parameters())
        values = {name: own[name].detach() for name in self.names}

        def output(changed: dict[str, Tensor], one: Tensor) -> Tensor:
            return (functional_call(self.model, changed, (one[None],)) @ self.head)[0]

        gradients = vmap(grad(output), in_dims=(None, 0))(values, tokens)
        flat = torch.cat([gradients[name].flatten(1) for name in self.names], 1)
        projected = flat if self.directions is None else flat @ self.directions.T
        return torch.cat([self.model(tokens), projected], 1)
