"""What the rule rests on: predictions are final long before they are committed, the more so near a confident one.

From a sequential run, one token a call. Source: arXiv 2510.07081, delayed decoding and local determinism.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locally.checks import check_count
from locally.sequence.diffusion_decoding.generation import Decoding, DiffusionConfig, DiffusionOutput
from locally.sequence.diffusion_decoding.rules import FixedCount

CENTRES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # edges of the bins of the confidence around which agreement is counted


@dataclass(frozen=True)
class Agreement:
    """How often a prediction near another one is already the final token.

    `hits[b, d - 1]` of `pairs[b, d - 1]` masked positions, themselves below the anchor threshold, at distance d from a
    masked position whose confidence lies in bin b of `edges`, were predicted as they ended.
    """

    edges: tuple[float, ...]
    hits: Int[Tensor, "bins distances"]
    pairs: Int[Tensor, "bins distances"]

    @property
    def rate(self) -> Float[Tensor, "bins distances"]:
        """NaN where there was no pair."""
        return self.hits / self.pairs


@dataclass(frozen=True)
class DelayedDecoding:
    """Per token of the response: the first call from which its prediction was final, and the call that committed it."""

    output: DiffusionOutput
    first_stable: Int[Tensor, "rows response"]
    commit_step: Int[Tensor, "rows response"]
    agreement: Agreement

    @property
    def delay(self) -> Int[Tensor, "rows response"]:
        """Steps that each token was stable before it was committed."""
        return self.commit_step - self.first_stable


def analyze_delayed_decoding(
    model: Callable[..., Any],
    input_ids: Int[Tensor, "rows prompt"],
    config: DiffusionConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    anchor_threshold: float = 0.9,
    distances: int = 16,
) -> DelayedDecoding:
    """Decode one token a call and record when each prediction became final.

    Arguments, errors and cost are those of `diffusion_generate`; the rule of `config` is replaced by `FixedCount(1)`,
    and its early stop, stop sequences and temperature are left out. Memory: rows x response x block ids.

    >>> def copies(ids):  # every token equals the prompt's only one, whatever is masked
    ...     return torch.nn.functional.one_hot(ids[:, :1].expand_as(ids), 5).float()
    >>> config = DiffusionConfig(gen_length=4, block_length=4, mask_token_id=4)
    >>> found = analyze_delayed_decoding(copies, torch.tensor([[2]]), config)
    >>> found.first_stable.tolist(), found.delay.tolist()
    ([[0, 0, 0, 0]], [[0, 1, 2, 3]])
    """
    check_count("distances", distances)
    given = DiffusionConfig() if config is None else config
    sequential = DiffusionConfig(
        gen_length=given.gen_length,
        block_length=given.block_length,
        rule=FixedCount(1),
        mask_token_id=given.mask_token_id,
        logits_shift=given.logits_shift,
        cache=given.cache,
    )
    decoding = Decoding(model, input_ids, sequential, attention_mask=attention_mask)
    tokens, confidence = [], []  # of every call: all rows are in step, since each call commits one token of each
    for step in decoding:
        tokens.append(step.tokens)
        confidence.append(step.confidence)
    out = decoding.output
    length = given.block_length
    first, edges = [], torch.tensor(CENTRES, dtype=torch.float64, device=input_ids.device)
    hits = torch.zeros(len(CENTRES) - 1, distances, dtype=torch.long, device=input_ids.device)
    pairs = torch.zeros_like(hits)
    for start in range(0, given.gen_length, length):
        calls = slice(start, start + length)
        seen, sure = torch.stack(tokens[calls]), torch.stack(confidence[calls])  # calls x rows x block
        final = out.responses[:, calls]
        call = torch.arange(start, start + length, device=seen.device)[:, None, None]
        masked = call <= out.commit_step[:, calls]
        right = seen == final
        # the last call, up to the commitment, at which the prediction was another; stable from the next one on
        wrong = torch.where(masked & ~right, call + 1, torch.full_like(call, start))
        first.append(wrong.amax(0))
        _count(sure, masked, right, anchor_threshold, edges, hits, pairs)
    return DelayedDecoding(out, torch.cat(first, 1), out.commit_step, Agreement(CENTRES, hits, pairs))


def _count(
    sure: Tensor, masked: Tensor, right: Tensor, anchor_threshold: float, edges: Tensor, hits: Tensor, pairs: Tensor
) -> None:
    """Add one block's pairs, both directions of every distance."""
    bins = torch.bucketize(sure, edges[:-1], right=True) - 1  # -1 below the first edge
    moderate = masked & (sure < anchor_threshold)
    n = sure.shape[-1]
    for d in range(1, min(hits.shape[1], n - 1) + 1):
        for centre, other in ((slice(None, n - d), slice(d, None)), (slice(d, None), slice(None, n - d))):
            counted = masked[..., centre] & (bins[..., centre] >= 0) & moderate[..., other]
            which = bins[..., centre][counted]
            pairs[:, d - 1] += torch.bincount(which, minlength=len(pairs))
            hits[:, d - 1] += torch.bincount(which[right[..., other][counted]], minlength=len(hits))
