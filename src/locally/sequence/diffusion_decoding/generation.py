"""Generation with a masked diffusion language model: block after block, several tokens a call.

A response of masks is appended to the prompt and filled in from left to right by blocks; within a block each model call
predicts every masked position at once and a `CommitRule` says which predictions stay. The model sees the whole sequence
at every call, or, with a cache, the part of it that a block needs (Fast-dLLM, arXiv 2505.22618).
Source of the loop: LLaDA, arXiv 2502.09992; of the default rule: arXiv 2510.07081.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locally.checks import check_choice, check_count, check_nonnegative
from locally.sequence.diffusion_decoding.prediction import MEASURES, Generators, Measure, predict
from locally.sequence.diffusion_decoding.rules import CommitRule, LocalLeap


class Status(StrEnum):
    """How a row stands: still being written, or why it ended."""

    RUNNING = "running"
    LENGTH = "length"
    EOS = "end of sequence"
    STOP = "stop sequence"


@runtime_checkable
class WindowedModel(Protocol):
    """What caching needs of a model, and what saves others the logits that nobody reads.

    `logits_at` reads the whole sequence, computes no more than the cache's window once the cache is filled, and returns
    logits at `positions` only. `new_cache` makes an empty cache; its `keep` drops rows.
    """

    def logits_at(self, input_ids: Tensor, positions: Tensor, attention_mask: Tensor | None, cache: Any) -> Tensor:
        """Logits at `positions` of the whole sequence, (rows, positions, vocabulary).

        Args:
            input_ids: (rows, length).
            positions: where logits are wanted, (positions,).
            attention_mask: (rows, length), 0 at padding on the left; None where there is none.
            cache: filled by the first call, read by those after it; None computes everything.
        """

    def new_cache(self, window: slice) -> Any:
        """An empty cache whose window is these positions; the rest is computed once."""


@dataclass(frozen=True)
class DiffusionConfig:
    """How to generate. Lengths are in tokens.

    Args:
        gen_length: length of the response, N; every row gets this many tokens.
        block_length: of the blocks that are finished one after the other; must divide gen_length.
        rule: which predictions to commit after a call.
        temperature: >= 0; of the draw of tokens. Confidences stay those of temperature 1.
        confidence: "prob", which the method is defined with, "margin", "entropy" or "random".
        mask_token_id: None takes the model's.
        eos_token_id: None takes the model's, if it has one.
        early_stop: end a row after the block in which it first wrote the end of sequence.
        stop_sequences: token ids that end a row after the block that completes one of them.
        logits_shift: 1 where logits at position i predict token i + 1 (Dream), 0 where they predict token i. None takes
            the model's `logits_shift`, or 0.
        cache: "prefix" keeps keys and values of what precedes the block during its calls, "dual" also those of the
            masks that follow it; exact at a block's first call only. Needs a `WindowedModel`.

    Raises:
        ValueError, TypeError: naming the field.
    """

    gen_length: int = 256
    block_length: int = 32
    rule: CommitRule = field(default_factory=LocalLeap)
    temperature: float = 0.0
    confidence: Measure = "prob"
    mask_token_id: int | None = None
    eos_token_id: int | None = None
    early_stop: bool = False
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    logits_shift: Literal[0, 1] | None = None
    cache: Literal["prefix", "dual"] | None = None

    def __post_init__(self) -> None:
        check_count("gen_length", self.gen_length)
        check_count("block_length", self.block_length)
        if self.gen_length % self.block_length:
            raise ValueError(f"block_length must divide gen_length = {self.gen_length}, got {self.block_length}")
        if not callable(self.rule):
            raise TypeError(f"rule must be a commit rule such as LocalLeap(), got {self.rule!r}")
        check_nonnegative("temperature", self.temperature)
        check_choice("confidence", self.confidence, MEASURES)
        check_choice("logits_shift", self.logits_shift, (None, 0, 1))
        check_choice("cache", self.cache, (None, "prefix", "dual"))
        if not all(self.stop_sequences):
            raise ValueError("stop_sequences must not hold an empty sequence")


@dataclass(frozen=True)
class Step:
    """One call of the model, as `Decoding` yields it. `sequences` is a view of the work in progress: copy to keep."""

    block: int
    rows: Int[Tensor, " active"]  # which rows the model was called on
    committed: Bool[Tensor, "active block"]  # what this call settled
    tokens: Int[Tensor, "active block"]  # the prediction at every position of the block
    confidence: Float[Tensor, "active block"]
    sequences: Int[Tensor, "rows length"]
    settled: int  # tokens of the response that no row will change any more, a prefix


@dataclass(frozen=True)
class DiffusionOutput:
    """What was generated.

    `nfe` counts the model calls that each row took part in, `forward_calls` those of the batch. `commit_step` is the
    row's call, from 0, at which a position was settled, and `confidence` what the model then said; -1 and NaN where
    the row had ended before. Rows whose status is RUNNING still hold masks: the iteration was left before its end.
    """

    sequences: Int[Tensor, "rows length"]
    nfe: Int[Tensor, " rows"]
    forward_calls: int
    commit_step: Int[Tensor, "rows response"]
    confidence: Float[Tensor, "rows response"]
    status: tuple[Status, ...]

    @property
    def responses(self) -> Int[Tensor, "rows response"]:
        """The sequences without their prompts."""
        return self.sequences[:, self.sequences.shape[1] - self.commit_step.shape[1] :]


def diffusion_generate(
    model: Callable[..., Any],
    input_ids: Int[Tensor, "rows prompt"],
    config: DiffusionConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    generator: Generators = None,
    stop: Callable[[list[int]], bool] | None = None,
    callback: Callable[[Step], object] | None = None,
) -> DiffusionOutput:
    """Append `config.gen_length` tokens to each prompt.

    Args:
        model: any callable from ids (rows, length) to logits (rows, length, vocab), or to an object that has them as
            `.logits`; called with `attention_mask=` where one is given. Modules should be in evaluation mode.
        input_ids: prompts of equal length, padded on the left where they differ.
        attention_mask: of the prompts, ones for tokens and zeros for padding on the left; positions are the model's.
        generator: of the noise at a temperature; one a row makes a row independent of the rows beside it.
        stop: asked of a row's response so far after each block; true ends the row, as a stop sequence does.
        callback: sees every step. An exception that it raises ends the generation.

    Raises:
        ValueError, TypeError: bad arguments, a prompt that leaves no room in the model's context, no mask token, a
            cache with a model that has none, logits of the wrong shape or with NaN.

    One forward pass a call, at most gen_length calls a row; a rule costs O(block) beside it. arXiv 2510.07081.

    >>> def model(ids):  # knows the alphabet: each token is one more than its known left neighbour, else uniform
    ...     known = torch.nn.functional.pad(ids, (1, 0))[:, :-1]
    ...     logits = torch.zeros(*ids.shape, 12).scatter_(-1, (known + 1).clamp(max=11)[..., None], 9.0)
    ...     return logits * (known != 11)[..., None]
    >>> config = DiffusionConfig(gen_length=4, block_length=2, mask_token_id=11)
    >>> out = diffusion_generate(model, torch.tensor([[3], [5]]), config)
    >>> out.responses.tolist(), out.nfe.tolist()
    ([[4, 5, 6, 7], [6, 7, 8, 9]], [4, 4])
    """
    decoding = Decoding(model, input_ids, config, attention_mask=attention_mask, generator=generator, stop=stop)
    for step in decoding:
        if callback is not None:
            callback(step)
    return decoding.output


class Decoding:
    """A generation that is read step by step; arguments and errors are those of `diffusion_generate`.

    Iterating yields a `Step` a model call, `output` is what there is so far. Leaving the loop ends the work.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        input_ids: Int[Tensor, "rows prompt"],
        config: DiffusionConfig | None = None,
        *,
        attention_mask: Tensor | None = None,
        generator: Generators = None,
        stop: Callable[[list[int]], bool] | None = None,
    ) -> None:
        self.config = config = DiffusionConfig() if config is None else config
        self.model = model
        if input_ids.ndim != 2 or not input_ids.shape[0] or input_ids.is_floating_point():
            raise ValueError(f"input_ids must be integers of shape (rows, prompt), got {tuple(input_ids.shape)}")
        rows, self.prompt_length = input_ids.shape
        mask_token_id = special_token(model, "mask_token_id", config.mask_token_id)
        if mask_token_id is None:
            raise ValueError("mask_token_id must be given: neither the configuration nor the model has one")
        self.mask_token_id = mask_token_id
        self.eos_token_id = special_token(model, "eos_token_id", config.eos_token_id)
        self.stop = stop
        self.ends_early = config.early_stop or bool(config.stop_sequences) or stop is not None
        if self.eos_token_id is None and self.ends_early:
            raise ValueError("eos_token_id must be given for early_stop, stop_sequences and stop: the model has none")
        self.shift = getattr(model, "logits_shift", 0) if config.logits_shift is None else config.logits_shift
        if config.cache and not isinstance(model, WindowedModel):
            raise TypeError(f"cache={config.cache!r} needs a model with logits_at and new_cache, got {_name(model)}")
        check_context(model, self.prompt_length + config.gen_length)
        if (input_ids == self.mask_token_id).any():
            warnings.warn("input_ids hold the mask token: it stays as it is in the prompt", stacklevel=2)
        if isinstance(generator, Sequence) and len(generator) != rows:
            raise ValueError(f"generator must be one or one a row: got {len(generator)} for {rows} rows")
        self.generator = generator
        self.attention_mask = None if attention_mask is None else self._extended(attention_mask, input_ids)

        response = input_ids.new_full((rows, config.gen_length), self.mask_token_id)
        self.x = torch.cat([input_ids, response], 1)
        self.nfe = torch.zeros(rows, dtype=torch.long, device=input_ids.device)
        self.forward_calls = 0
        self.commit_step = torch.full_like(response, -1, dtype=torch.long)
        self.confidence = torch.full_like(response, torch.nan, dtype=torch.float64)
        self.status = [Status.RUNNING] * rows

    @property
    def output(self) -> DiffusionOutput:
        """What is written so far, with its costs; a copy."""
        tensors = self.x.clone(), self.nfe.clone(), self.commit_step.clone(), self.confidence.clone()
        x, nfe, commit_step, confidence = tensors
        return DiffusionOutput(x, nfe, self.forward_calls, commit_step, confidence, tuple(self.status))

    def __iter__(self) -> Iterator[Step]:
        length = self.config.block_length
        for block, start in enumerate(range(0, self.config.gen_length, length)):
            rows = torch.tensor([r for r, s in enumerate(self.status) if s is Status.RUNNING], device=self.x.device)
            if not len(rows):
                return
            yield from self._fill(block, slice(start, start + length), rows)
            self._end_rows(start + length)
        self.status = [Status.LENGTH if s is Status.RUNNING else s for s in self.status]

    def _fill(self, number: int, block: slice, rows: Int[Tensor, " active"]) -> Iterator[Step]:
        """Call the model on the rows whose block still holds masks, until none does."""
        absolute = slice(self.prompt_length + block.start, self.prompt_length + block.stop)
        # Position i is read at i - shift; the very first token has no left neighbour and is read at itself.
        positions = (torch.arange(absolute.start, absolute.stop, device=self.x.device) - self.shift).clamp_min(0)
        cache = self._new_cache(absolute)
        masked = self.x[rows, absolute] == self.mask_token_id
        step = 0
        while len(rows):
            found = self._predict(rows, positions, cache)
            commit = self.config.rule(found.confidence, masked, step)
            self._commit(rows, absolute, commit, found.tokens, found.confidence)
            masked = masked & ~commit
            settled = block.start + int((~masked).all(0).cumprod(0).sum())
            yield Step(number, rows, commit, found.tokens, found.confidence, self.x, settled)
            unfinished = masked.any(1)
            if not unfinished.all():  # rows that are done leave the batch, and the cache with them
                rows, masked = rows[unfinished], masked[unfinished]
                if cache is not None:
                    cache.keep(unfinished)
            step += 1

    def _new_cache(self, block: slice) -> Any:
        """Prefix: block and what follows it are computed anew at every call. Dual: the block alone."""
        if self.config.cache is None or not isinstance(self.model, WindowedModel):
            return None
        start = max(block.start - self.shift, 0)  # where the logits of the block's first token are read
        return self.model.new_cache(slice(start, self.x.shape[1] if self.config.cache == "prefix" else block.stop))

    @torch.no_grad()
    def _predict(self, rows: Int[Tensor, " active"], positions: Int[Tensor, " n"], cache: Any) -> Any:
        everyone = len(rows) == len(self.x)
        ids = self.x if everyone else self.x[rows]
        mask = self.attention_mask if everyone or self.attention_mask is None else self.attention_mask[rows]
        if isinstance(self.model, WindowedModel):
            logits = self.model.logits_at(ids, positions, mask, cache)
        else:
            out = self.model(ids) if mask is None else self.model(ids, attention_mask=mask)
            logits = getattr(out, "logits", out)
            if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"model must return logits of shape {(*ids.shape, 'vocab')}, got {got}")
            logits = logits[:, positions]
        if self.mask_token_id >= logits.shape[-1]:
            raise ValueError(f"mask_token_id must be below {logits.shape[-1]} = vocabulary, got {self.mask_token_id}")
        generator = self.generator
        if isinstance(generator, Sequence):
            generator = [generator[r] for r in rows.tolist()]
        config = self.config
        return predict(
            logits, self.mask_token_id, temperature=config.temperature, measure=config.confidence, generator=generator
        )

    def _commit(self, rows: Tensor, where: slice, commit: Tensor, tokens: Tensor, confidence: Tensor) -> None:
        within = slice(where.start - self.prompt_length, where.stop - self.prompt_length)
        put = lambda known, new, part: known[rows, part].where(~commit, new)
        self.x[rows, where] = put(self.x, tokens, where)
        self.commit_step[rows, within] = put(self.commit_step, self.nfe[rows, None], within)
        self.confidence[rows, within] = put(self.confidence, confidence, within)
        self.nfe[rows] += 1
        self.forward_calls += 1

    def _end_rows(self, stop: int) -> None:
        """Rows whose response ends within its first `stop` tokens are filled up with the end of sequence."""
        if not self.ends_early or self.eos_token_id is None:
            return
        for row, written in enumerate(self.x[:, self.prompt_length : self.prompt_length + stop].tolist()):
            if self.status[row] is not Status.RUNNING:
                continue
            if self.config.early_stop and self.eos_token_id in written:
                self.status[row] = Status.EOS
            elif self._stopped(written):
                self.status[row] = Status.STOP
            else:
                continue
            self.x[row, self.prompt_length + stop :] = self.eos_token_id

    def _stopped(self, written: list[int]) -> bool:
        if any(find(written, sequence) is not None for sequence in self.config.stop_sequences):
            return True
        return self.stop is not None and self.stop(written)

    def _extended(self, mask: Tensor, input_ids: Tensor) -> Int[Tensor, "rows length"]:
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask must have shape {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
        mask = mask.long()
        if ((mask != 0) & (mask != 1)).any() or (mask.diff(dim=1) < 0).any():
            raise ValueError("attention_mask must be zeros, then ones: prompts are padded on the left")
        return torch.cat([mask, mask.new_ones(len(mask), self.config.gen_length)], 1)


def special_token(model: object, name: str, given: int | None) -> int | None:
    """The token id that was given, or the one that the model or its configuration names."""
    found = given
    for place in (model, getattr(model, "config", None)):
        found = getattr(place, name, None) if found is None else found
    if isinstance(found, Sequence):  # Transformers allows several ends of sequence
        found = found[0] if found else None
    if found is not None:
        check_count(name, found, at_least=0)
    return found


def check_context(model: object, length: int) -> None:
    """Refuse what does not fit into the context that the model or its configuration states."""
    for place in (model, getattr(model, "config", None)):
        limit = getattr(place, "max_position_embeddings", None)
        if isinstance(limit, int) and length > limit:
            raise ValueError(f"prompt and gen_length together must be at most {limit} tokens, got {length}")


def find(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where `wanted` first occurs in `tokens`."""
    starts = range(len(tokens) - len(wanted) + 1)
    return next((i for i in starts if tuple(tokens[i : i + len(wanted)]) == tuple(wanted)), None)


def _name(model: object) -> str:
    return getattr(model, "__name__", type(model).__name__)
