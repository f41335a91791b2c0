"""Sequences that a gradient can move: logits, their probabilities, and tokens that are one-hot but not flat.

A design is a matrix of logits theta (length x letters). The model reads exact one-hot tokens; the gradient passes
through them as if they were the probabilities (straight-through). Source: arXiv 2301.02931, Section 3.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot


def initial_logits(
    sequences: Int[Tensor, "designs length"],
    letters: int,
    *,
    scale: float = 0.01,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "designs length letters"]:
    """Small random logits that decode to the given sequences.

    One matrix N(0, scale^2) for all designs; in each row the largest entry changes places with that of the letter.
    """
    noise = torch.randn(sequences.shape[1], letters, generator=generator, dtype=torch.float64) * scale
    return swap_in(noise.to(dtype), sequences)


def swap_in(
    noise: Float[Tensor, "length letters"], sequences: Int[Tensor, "designs length"]
) -> Float[Tensor, "designs length letters"]:
    """Exchange the largest entry of each row with that of the sequence's letter."""
    theta = noise.expand(len(sequences), *noise.shape).clone()
    largest, where = theta.max(2, keepdim=True)
    letter = sequences[..., None].to(noise.device)
    theta.scatter_(2, where, theta.gather(2, letter))
    return theta.scatter_(2, letter, largest)


def soft_words(
    probabilities: Float[Tensor, "designs length letters"], k: int
) -> Float[Tensor, "designs windows vocabulary"]:
    """Probabilities of overlapping k-mers of independent letters; k-mers in base `letters`, first letter first."""
    windows = probabilities.shape[1] - k + 1
    if windows < 1:
        raise ValueError(f"k-mers of {k} letters do not fit into sequences of {probabilities.shape[1]}")
    words = probabilities[:, :windows]
    for offset in range(1, k):
        words = (words[..., None] * probabilities[:, offset : offset + windows, None]).flatten(2)
    return words


def straight_through(soft: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch vocabulary"]:
    """One-hot at the largest entry; its gradient is that of `soft` itself."""
    hard = one_hot(soft.detach().argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())  # the bracket is exactly zero: hard - soft + soft would round


def tokens(theta: Float[Tensor, "designs length letters"], k: int = 1) -> Float[Tensor, "designs windows vocabulary"]:
    """What the language model reads of the designs: one-hot letters or k-mers with soft gradients.

    >>> theta = initial_logits(torch.tensor([[0, 1, 2, 3]]), 4, generator=torch.Generator().manual_seed(0))
    >>> tokens(theta).argmax(2).tolist(), tokens(theta, 3).argmax(2).tolist()
    ([[0, 1, 2, 3]], [[6, 27]])
    """
    probabilities = theta.softmax(-1)
    return straight_through(probabilities if k == 1 else soft_words(probabilities, k))
