"""What one model call says of every position: the token it would write there, and how sure it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

Measure = Literal["prob", "margin", "entropy", "random"]
MEASURES: tuple[str, ...] = get_args(Measure)
Generators = Generator | Sequence[Generator] | None


@dataclass(frozen=True)
class Prediction:
    """The token that would be written at every position, and how sure the model is of it."""

    tokens: Int[Tensor, "rows n"]
    confidence: Float[Tensor, "rows n"]  # in [0, 1]


def predict(
    logits: Float[Tensor, "rows n vocab"],
    mask_token_id: int,
    *,
    temperature: float = 0.0,
    measure: Measure = "prob",
    generator: Generators = None,
) -> Prediction:
    """Most probable token and its confidence at every position, in double precision.

    A temperature draws tokens by Gumbel noise and leaves the confidence alone, which is always that of the softmax at
    temperature 1. The mask itself is never predicted: a model that prefers it would never end.

    Args:
        measure: "prob", the probability of the token; "margin" between the two most probable; "entropy", one minus the
            entropy over the largest possible; "random", uniform numbers. The method is defined with "prob".
        generator: of the noise; one a row makes a row's draws independent of the rows beside it.

    Raises:
        ValueError: NaN among the logits, or a position without a possible token.
    """
    scores = logits.to(torch.float64, copy=True)
    scores[..., mask_token_id] = -torch.inf
    log_total = scores.logsumexp(-1, keepdim=True)
    if not log_total.isfinite().all():
        raise ValueError("the model returned NaN or infinite logits, or no token but the mask")
    tokens = (scores + temperature * gumbel(scores, generator) if temperature > 0 else scores).argmax(-1)
    if measure == "random":
        return Prediction(tokens, uniform(tokens.shape, scores, generator))
    log_p = scores - log_total
    if measure == "prob":
        return Prediction(tokens, log_p.gather(-1, tokens[..., None])[..., 0].exp())
    p = log_p.exp()
    if measure == "margin":
        first, second = p.topk(2, dim=-1).values.unbind(-1)
        return Prediction(tokens, first - second)
    return Prediction(tokens, 1 + torch.special.xlogy(p, p).sum(-1) / math.log(p.shape[-1]))


def gumbel(like: Tensor, generator: Generators) -> Tensor:
    return -(-uniform(like.shape, like, generator).clamp_min(torch.finfo(torch.float64).tiny).log()).log()


def uniform(shape: Sequence[int], like: Tensor, generator: Generators) -> Tensor:
    """Double precision numbers in [0, 1) on the device of `like`."""
    if isinstance(generator, Sequence):
        return torch.cat([uniform((1, *shape[1:]), like, g) for g in generator])
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device=like.device)
