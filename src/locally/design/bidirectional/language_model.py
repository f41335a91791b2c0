"""A small masked language model for sequences, trained in place, and what every model here has in common.

A model maps tokens - one-hot rows over letters or k-mers, or mixtures of them - to one feature vector a sequence, the
mean of its last hidden states. Any module that does so can guide a design.
"""

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from locally.checks import check_between, check_count, check_positive
from locally.design.bidirectional.adaptive import Adam
from locally.design.bidirectional.sequences import Sequences, SequenceSpace, words

WEIGHT_DECAY = 0.01

Progress = Callable[[int, float], bool | None]


@runtime_checkable
class SequenceModel(Protocol):
    """Frozen features of sequences.

    Attributes:
        kmer: letters in a token, 1 for models that read letter by letter.
    """

    kmer: int

    def __call__(
        self, tokens: Float[Tensor, "sequences positions vocabulary"]
    ) -> Float[Tensor, "sequences features"]: ...


class OneHotFeatures(nn.Module):
    """The letters themselves, flattened: a linear model of positions, and what BDI's network reads."""

    kmer = 1

    def forward(self, tokens: Float[Tensor, "sequences positions vocabulary"]) -> Float[Tensor, "sequences features"]:
        return tokens.flatten(1)


def embed(
    model: SequenceModel,
    indices: Int[ndarray, "n length"],
    letters: int,
    *,
    batch: int = 512,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[float], None] | None = None,
) -> Float[Tensor, "n p"]:
    """Features of a whole table in float64, in batches."""
    numbers = torch.as_tensor(words(indices, letters, model.kmer), device=device)
    parts = []
    with torch.no_grad():
        for start in range(0, len(numbers), batch):
            tokens = F.one_hot(numbers[start : start + batch], letters**model.kmer).to(dtype)
            parts.append(model(tokens).double())
            if progress is not None:
                progress(min(1.0, (start + batch) / len(numbers)))
    return torch.cat(parts)


class MaskedLM(nn.Module):
    """Two residual convolution blocks over letters, pretrained to fill in what is hidden: a language model in seconds.

    Called with tokens it returns the mean of its last hidden states; `logits` is what pretraining trains.

    Args:
        letters: of the alphabet, at least 2.
        width: of the hidden states.
        hidden: channels within a block.
        kernels: odd sizes of the convolution of each block.
        generator: of the initial weights; default torch's own.

    >>> model = MaskedLM(4, generator=torch.Generator().manual_seed(0)).eval()
    >>> model(torch.eye(4).expand(2, 4, 4)).shape
    torch.Size([2, 64])
    """

    kmer = 1

    def __init__(
        self,
        letters: int,
        *,
        width: int = 64,
        hidden: int = 128,
        kernels: tuple[int, ...] = (7, 5),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("letters", letters, at_least=2)
        check_count("width", width)
        check_count("hidden", hidden)
        if not kernels or any(k < 1 or k % 2 == 0 for k in kernels):
            raise ValueError(f"kernels must be odd and at least one, got {kernels}")
        self.letters = letters
        self.embedding = nn.Linear(letters + 1, width, bias=False)  # the last row is the mask
        self.blocks = nn.ModuleList(ConvolutionBlock(width, hidden, k) for k in kernels)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, letters)
        if generator is not None:
            draw(self, generator)

    def states(self, tokens: Float[Tensor, "n length tokens"]) -> Float[Tensor, "n length width"]:
        """Hidden states of every position, of tokens over the letters with or without the mask."""
        x = tokens @ self.embedding.weight[:, : tokens.shape[2]].T
        for block in self.blocks:
            x = x + block(x)
        return x

    def logits(self, tokens: Float[Tensor, "n length tokens"]) -> Float[Tensor, "n length letters"]:
        """Unnormalised log probabilities of the letter at every position."""
        return self.head(self.norm(self.states(tokens)))

    def forward(self, tokens: Float[Tensor, "n length letters"]) -> Float[Tensor, "n width"]:
        return self.states(tokens).mean(1)


class ConvolutionBlock(nn.Module):
    def __init__(self, width: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(width, hidden, kernel, padding=kernel // 2)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "n length width"]) -> Float[Tensor, "n length width"]:
        hidden = F.gelu(self.convolution(self.norm(x).transpose(1, 2)))
        return self.out(hidden.transpose(1, 2))


def draw(module: nn.Module, generator: torch.Generator) -> None:
    """Weights as torch draws them by default, but from this generator: uniform within 1 / sqrt(fan in)."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv1d):
                bound = part.weight[0].numel() ** -0.5
                for parameter in part.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)


def one_cycle(progress: float, peak: float) -> float:
    """Learning rate at a share of the training in (0, 1]: up from peak / 25 over 30 %, then down to almost nothing."""
    low, high, share = (peak / 25, peak, progress / 0.3) if progress < 0.3 else (0.0, peak, (1 - progress) / 0.7)
    return low + (high - low) * (1 - math.cos(math.pi * share)) / 2


def pretrain(
    model: MaskedLM,
    space: SequenceSpace,
    sequences: Sequences,
    *,
    steps: int = 700,
    batch: int = 128,
    rate: float = 2e-3,
    mask: float = 0.15,
    rng: np.random.Generator,
    callback: Progress | None = None,
) -> list[float]:
    """Train in place to predict masked letters of unlabelled sequences; the model ends in eval mode and frozen.

    AdamW under a one-cycle schedule (torch.optim would cost more to import than this to run). Scores are not needed and
    not seen.

    Args:
        sequences: of the space, as strings or indices.
        steps: optimizer steps of `batch` sequences, at least 1.
        rate: peak of the learning rate, > 0.
        mask: share of letters that are hidden, in (0, 1).
        callback: `callback(step, loss)` sees every step and ends the training by returning True.

    Returns:
        Cross-entropy of the masked letters in nats at every step; log(letters) is chance.
    """
    check_count("steps", steps)
    check_count("batch", batch)
    check_positive("rate", rate)
    check_between("mask", mask, 0, 1)
    device = next(model.parameters()).device
    letters = torch.as_tensor(space.encode(sequences), device=device)
    model.train().requires_grad_(True)
    weights = list(model.parameters())
    flat = parameters_to_vector(weights).detach()
    vector_to_parameters(flat, weights)  # the weights are now views of `flat`
    adam = Adam.like(flat)
    losses: list[float] = []
    for step in range(1, steps + 1):
        chosen = letters[torch.as_tensor(rng.integers(0, len(letters), batch), device=device)]
        hidden = torch.as_tensor(rng.random(chosen.shape) < mask, device=device)
        if not hidden.any():
            continue
        tokens = F.one_hot(torch.where(hidden, model.letters, chosen), model.letters + 1).float()
        loss = F.cross_entropy(model.logits(tokens)[hidden], chosen[hidden])
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, weights)])
        now = one_cycle(step / steps, rate)
        flat.mul_(1 - now * WEIGHT_DECAY).sub_(now * adam.direction(gradient))
        losses.append(loss.item())
        if callback is not None and callback(step, losses[-1]):
            break
    model.eval().requires_grad_(False)
    return losses
