"""Prompts in, completions out: tokenizers, batches, stop strings and streaming around `Decoding`."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from locally.checks import check_count
from locally.errors import require
from locally.sequence.diffusion_decoding.generation import Decoding, DiffusionConfig, Status, check_context
from locally.sequence.diffusion_decoding.loading import Kind, LanguageModel


@dataclass(frozen=True)
class Completion:
    """One prompt's answer: `tokens` generated, model `calls` that it took part in, `seconds` of its batch."""

    index: int
    prompt: str
    text: str
    tokens: int
    calls: int
    seconds: float
    status: str


@dataclass(frozen=True)
class _Prompt:
    index: int
    text: str
    ids: list[int]


def complete(
    language: LanguageModel,
    prompts: Sequence[tuple[int, str]],
    config: DiffusionConfig,
    *,
    chat: bool = False,
    stop: Sequence[str] = (),
    batch_size: int = 1,
    seed: int = 0,
    on_text: Callable[[str], object] | None = None,
    on_progress: Callable[[float], object] | None = None,
) -> Iterator[Completion]:
    """Complete prompts batch after batch, in their order; an iterator that may be left at any time.

    Args:
        prompts: pairs of a number, which says how the noise is seeded and comes back with the answer, and a text.
        config: of a causal model only gen_length and temperature are used.
        chat: put each prompt into the tokenizer's chat template as what the user says.
        stop: strings that end an answer; they are not part of it.
        batch_size: prompts of different lengths share a batch where the model allows padding on the left.
        on_text: gets the text as it settles, of batches of one prompt.
        on_progress: gets the share of all tokens that are settled, in [0, 1], as it grows.

    Raises:
        ValueError: no tokenizer or no chat template, an empty prompt, or one that leaves no room in the model's
            context; before any work.
    """
    check_count("batch_size", batch_size)
    if not all(stop):
        raise ValueError("stop must not hold an empty string")
    encoded = [_Prompt(index, text, encode(language, text, chat)) for index, text in prompts]
    for prompt in encoded:
        try:
            check_context(language.model, len(prompt.ids) + config.gen_length)
        except ValueError as error:
            raise ValueError(f"prompt {prompt.index + 1} has {len(prompt.ids)} tokens: {error}") from None
    config = replace(config, mask_token_id=language.mask_token_id, eos_token_id=language.eos_token_id)
    work = _causally if language.kind is Kind.CAUSAL else _by_diffusion
    return _answers(language, encoded, config, work, tuple(stop), batch_size, seed, on_text, on_progress)


def encode(language: LanguageModel, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt as the model expects it."""
    tokenizer = language.tokenizer
    if tokenizer is None:
        raise ValueError(f"{language.folder} has no tokenizer: text cannot be read")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"the tokenizer of {language.folder} has no chat template")
        said = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    # BERT's tokenizers close a text with a separator, after which nothing would follow: only their opening is kept.
    bare = chat or language.kind is Kind.MASKED
    ids = list(tokenizer(prompt, add_special_tokens=not bare)["input_ids"])
    if language.kind is Kind.MASKED and not chat and tokenizer.cls_token_id is not None:
        ids.insert(0, tokenizer.cls_token_id)
    if not ids:
        raise ValueError("prompt must not be empty: it has no token")
    return ids


def _answers(
    language: LanguageModel,
    prompts: list[_Prompt],
    config: DiffusionConfig,
    work: Callable[..., list[tuple[list[int], int, str]]],
    stop: tuple[str, ...],
    batch_size: int,
    seed: int,
    on_text: Callable[[str], object] | None,
    on_progress: Callable[[float], object] | None,
) -> Iterator[Completion]:
    done, progress = 0, on_progress or (lambda share: None)
    for batch in batches(prompts, batch_size, ragged=language.kind is not Kind.MASKED):
        start = time.perf_counter()
        told = Telling(language.tokenizer, on_text if len(batch) == 1 else None, stop, language.eos_token_id)

        def settled(tokens: list[int], told: Telling = told, before: int = done, size: int = len(batch)) -> None:
            told.settle(tokens)
            progress((before + size * len(tokens) / config.gen_length) / len(prompts))

        answers = work(language, batch, config, stop, seed, settled)
        seconds = time.perf_counter() - start
        done += len(batch)
        progress(done / len(prompts))
        for prompt, (tokens, calls, status) in zip(batch, answers, strict=True):
            text = readable(language.tokenizer, tokens, stop, language.eos_token_id)
            told.tell(text)
            yield Completion(prompt.index, prompt.text, text, len(tokens), calls, seconds, status)


def batches(prompts: Sequence[_Prompt], size: int, ragged: bool) -> Iterator[list[_Prompt]]:
    """Neighbours together; prompts of one length only where the model has no padding on the left."""
    batch: list[_Prompt] = []
    for prompt in prompts:
        if batch and (len(batch) == size or not (ragged or len(prompt.ids) == len(batch[0].ids))):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def readable(tokenizer: Any, tokens: list[int], stop: Sequence[str], eos: int | None) -> str:
    """The text up to the end of sequence and the first stop string."""
    special = [i for i, t in tokenizer.added_tokens_decoder.items() if t.special and t.content in stop]
    ends = [eos, *special]  # special tokens leave no trace in the text
    tokens = tokens[: min((tokens.index(i) for i in ends if i in tokens), default=len(tokens))]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    cuts = [at for at in (text.find(s) for s in stop) if at >= 0]
    return text[: min(cuts)] if cuts else text


class Telling:
    """Hands out text that will not change any more, piece by piece."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object] | None, stop: Sequence[str], eos: Any) -> None:
        self.tokenizer, self.on_text, self.stop, self.eos = tokenizer, on_text, stop, eos
        self.told = ""

    def settle(self, tokens: list[int]) -> None:
        """The response begins with these tokens."""
        if self.on_text is None:
            return
        text = readable(self.tokenizer, tokens, self.stop, self.eos).rstrip("\ufffd")  # half of a character
        held = max((_overlap(text, s) for s in self.stop), default=0)  # what may become a stop string
        self.tell(text[: len(text) - held])

    def tell(self, text: str) -> None:
        """The answer begins with this text."""
        if self.on_text is not None and text.startswith(self.told) and len(text) > len(self.told):
            self.on_text(text[len(self.told) :])
            self.told = text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _padded(batch: Sequence[_Prompt], filler: int, device: Any) -> tuple[Int[Tensor, "rows n"], Tensor | None]:
    """Ids and attention mask; None where all prompts have one length."""
    longest = max(len(p.ids) for p in batch)
    ids = torch.tensor([[filler] * (longest - len(p.ids)) + p.ids for p in batch], device=device)
    if all(len(p.ids) == longest for p in batch):
        return ids, None
    ones = [[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in batch]
    return ids, torch.tensor(ones, device=device)


def _by_diffusion(
    language: LanguageModel,
    batch: list[_Prompt],
    config: DiffusionConfig,
    stop: tuple[str, ...],
    seed: int,
    settled: Callable[[list[int]], None],
) -> list[tuple[list[int], int, str]]:
    device = next(language.model.parameters()).device
    filler = language.eos_token_id or 0
    ids, attention_mask = _padded(batch, filler, device)
    generators = None
    if config.temperature > 0 or config.confidence == "random":
        generators = [torch.Generator(device).manual_seed(seed + 1_000_003 * p.index) for p in batch]
    tokenizer: Any = language.tokenizer
    contains = lambda tokens: any(s in tokenizer.decode(tokens) for s in stop)
    decoding = Decoding(
        language.model,
        ids,
        config,
        attention_mask=attention_mask,
        generator=generators,
        stop=contains if stop else None,
    )
    width = ids.shape[1]
    for step in decoding:
        settled(step.sequences[0, width : width + step.settled].tolist())
    out = decoding.output
    answers = []
    for tokens, calls, placed, status in zip(out.responses.tolist(), out.nfe.tolist(), out.commit_step, out.status):
        answers.append((tokens[: int((placed >= 0).sum())], calls, str(status)))
    return answers


def _causally(
    language: LanguageModel,
    batch: list[_Prompt],
    config: DiffusionConfig,
    stop: tuple[str, ...],
    seed: int,
    settled: Callable[[list[int]], None],
) -> list[tuple[list[int], int, str]]:
    """Transformers' own generation, one token a call; sampling goes prompt by prompt, each with a seed of its own."""
    if config.temperature > 0 and len(batch) > 1:
        return [_causally(language, [p], config, stop, seed, lambda tokens: None)[0] for p in batch]
    require("transformers", "llm")
    from transformers.generation.streamers import BaseStreamer

    class Settled(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] | None = None

        def put(self, value: Tensor) -> None:
            if self.tokens is None:  # the prompt comes first
                self.tokens = []
            else:
                self.tokens.extend(value.flatten().tolist())
                settled(self.tokens)

        def end(self) -> None:
            pass

    model, eos = language.model, language.eos_token_id
    ids, attention_mask = _padded(batch, eos or 0, next(model.parameters()).device)
    options: dict[str, Any] = {"max_new_tokens": config.gen_length, "do_sample": False, "pad_token_id": eos or 0}
    if config.temperature > 0:
        options |= {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    if stop:
        options |= {"stop_strings": list(stop), "tokenizer": language.tokenizer}
    if len(batch) == 1:
        options["streamer"] = Settled()
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed + 1_000_003 * batch[0].index)
        out = model.generate(ids, attention_mask=mask, **options)  # type: ignore[operator]
    answers = []
    for row in out[:, ids.shape[1] :].tolist():
        ended = eos in row
        tokens = row[: row.index(eos) + 1] if ended else row
        text = language.tokenizer.decode(tokens)  # type: ignore[union-attr]
        found = any(s in text for s in stop)
        status = Status.EOS if ended else Status.STOP if found else Status.LENGTH
        answers.append((tokens, len(tokens), str(status)))
    return answers
