"""`locally generate`: text from a language model in a local folder, masked diffusion models above all."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from io import BufferedRandom
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locally.errors import UsageError

if TYPE_CHECKING:
    from locally.sequence.diffusion_decoding import Completion, DiffusionConfig

RULES = ("localleap", "threshold", "fixed", "schedule", "greedy")
DTYPES = ("float32", "bfloat16", "float16")


def generate(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a checkpoint: config.json, safetensors, tokenizer.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='File of prompts: one a line, or objects with "prompt" if it ends in .jsonl; - for stdin.'),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append one JSON object a prompt to this file.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Skip the prompts whose answers --output holds already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt.")] = False,
    stream: Annotated[
        bool | None, typer.Option(help="Print text as it settles; the default on a terminal, one prompt at a time.")
    ] = None,
    gen_length: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 256,
    block_length: Annotated[
        int | None, typer.Option(help="Tokens of a block, a divisor of --gen-length; 32 unless named, or all if fewer.")
    ] = None,
    rule: Annotated[str | None, typer.Option(help=f"{', '.join(RULES)}; localleap unless named.")] = None,
    anchor_threshold: Annotated[float, typer.Option(help="localleap: confidence of an anchor, in (0, 1).")] = 0.9,
    relaxed_threshold: Annotated[float, typer.Option(help="localleap: confidence near an anchor, in (0, 1).")] = 0.75,
    radius: Annotated[int, typer.Option(help="localleap: how many tokens from an anchor are near.")] = 4,
    threshold: Annotated[float, typer.Option(help="threshold: confidence to commit, in (0, 1).")] = 0.9,
    tokens_per_step: Annotated[int, typer.Option(help="fixed: tokens to commit at every call.")] = 2,
    steps: Annotated[int | None, typer.Option(help="schedule: calls for the whole response.")] = None,
    cache: Annotated[str | None, typer.Option(help="prefix or dual: keys and values kept within a block.")] = None,
    temperature: Annotated[float, typer.Option(help="0 for the most probable tokens.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws at a temperature.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends an answer; may be repeated.")] = None,
    chat: Annotated[
        bool | None, typer.Option(help="Use the tokenizer's chat template; the default where it has one.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Prompts at a time.")] = 8,
    device: Annotated[str, typer.Option(help="A torch device, such as cpu or cuda:0.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; as stored unless named.")] = None,
) -> None:
    """Complete prompts with a LLaDA or Dream checkpoint, or with any masked or causal one that Transformers knows."""
    if resume and output is None:
        raise UsageError("--resume needs --output: the file whose answers are to be kept")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if stream and (as_json or output):
        raise UsageError("--stream is for text on standard output, not for --json or --output")
    asked = _prompts(prompt or [], prompts)
    from locally.sequence.diffusion_decoding import DiffusionConfig, Kind, complete, load
    from locally.sequence.diffusion_decoding.loading import kind_of

    block = min(32, gen_length) if block_length is None else block_length
    try:
        chosen = _rule(
            rule,
            anchor_threshold,
            relaxed_threshold,
            radius,
            threshold,
            tokens_per_step,
            steps,
            gen_length,
            block,
        )
        options: dict[str, Any] = {"temperature": temperature, "cache": cache, "early_stop": True, "rule": chosen}
        config = DiffusionConfig(gen_length=gen_length, block_length=block, **options)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    architecture, kind = kind_of(model_dir)
    if kind is Kind.CAUSAL and (rule or cache):
        raise UsageError(f"--rule and --cache are for masked diffusion models: {architecture} writes token after token")
    if kind is Kind.MASKED and cache:
        raise UsageError(f"--cache is for LLaDA and Dream models: {architecture} keeps no keys and values")
    with ExitStack() as open_files:
        answers = None
        if output is not None:
            chat_said = {None: "default", True: "yes", False: "no"}[chat]
            facts = _settings(model_dir, config, {"seed": seed, "stop": stop or [], "chat": chat_said, "dtype": dtype})
            answers = open_files.enter_context(AnswerFile(output, facts, resume=resume))
            asked = answers.left(asked)
        if not asked:
            print(f"nothing left to do: {output} holds every answer", file=sys.stderr)
            return
        _quieten()
        language = _loaded(load, model_dir, dtype, device)
        if language.eos_token_id is None:
            from dataclasses import replace

            if stop and kind is not Kind.CAUSAL:
                raise UsageError(f"--stop needs an end of sequence to fill up with: {model_dir} names none")
            config = replace(config, early_stop=False)
        talks = bool(getattr(language.tokenizer, "chat_template", None)) if chat is None else chat
        streams = stream if stream is not None else sys.stdout.isatty() and not as_json and output is None
        try:
            _write(
                complete(
                    language,
                    asked,
                    config,
                    chat=talks,
                    stop=stop or (),
                    batch_size=1 if streams else batch_size,
                    seed=seed,
                    on_text=_say if streams else None,
                    on_progress=None if streams else _show_share,
                ),
                total=len(asked),
                answers=answers,
                as_json=as_json,
                streams=streams,
            )
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from None


class AnswerFile:
    """Answers, one JSON object a line, each on disk before the next prompt is begun.

    A line that a killed process has left unfinished is dropped. An existing file is never overwritten, and continued
    only with the prompts and settings that it was begun with.
    """

    def __init__(self, path: Path, settings: str, *, resume: bool) -> None:
        self.path, self.settings, self.resume = path, settings, resume
        self.done: dict[int, str] = {}  # prompt of each index

    def __enter__(self) -> "AnswerFile":
        from filelock import FileLock, Timeout

        if self.path.exists() and not self.path.is_file():
            raise UsageError(f"cannot write {self.path}: it is no file")
        if self.path.exists() and self.path.stat().st_size and not self.resume:
            raise UsageError(f"{self.path} exists already: --resume continues it")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=0)
            self.lock.acquire()
        except Timeout:
            raise UsageError(f"another process is writing {self.path}") from None
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror}") from None
        try:
            self.file = self._opened()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self._unlock()

    def left(self, asked: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
        """The prompts without an answer; UsageError where the answers are to other prompts."""
        known = dict(asked)
        for index, text in self.done.items():
            if known.get(index) != text:
                raise UsageError(f"{self.path} answers another prompt {index + 1}: {text[:40]!r}")
        return [(index, text) for index, text in asked if index not in self.done]

    def add(self, answer: dict[str, Any]) -> None:
        self.file.write(json.dumps(answer | {"settings": self.settings}, ensure_ascii=False).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def _opened(self) -> BufferedRandom:
        try:
            file = self.path.open("r+b" if self.path.exists() else "w+b")
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror}") from None
        whole = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            self._know(number, line)
            whole += len(line)
        file.seek(whole)
        file.truncate()
        return file

    def _know(self, number: int, line: bytes) -> None:
        try:
            answer = json.loads(line)
            index, text, settings = answer["index"], answer["prompt"], answer["settings"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{self.path}, line {number}: no answer of locally generate") from None
        if settings != self.settings:
            raise UsageError(f"{self.path} was begun with another model or other settings: write to a new file")
        self.done[index] = text

    def _unlock(self) -> None:
        self.lock.release()
        Path(self.lock.lock_file).unlink(missing_ok=True)


def _rule(
    name: str | None,
    anchor_threshold: float,
    relaxed_threshold: float,
    radius: int,
    threshold: float,
    tokens_per_step: int,
    steps: int | None,
    gen_length: int,
    block_length: int,
) -> Any:
    """The commit rule; options of other rules are checked all the same, so that none is wrong without a word."""
    from locally.sequence.diffusion_decoding import FixedCount, LocalLeap, Schedule, Threshold

    if name is not None and name not in RULES:
        raise UsageError(f"--rule must be one of {', '.join(RULES)}, got {name!r}")
    if (name == "schedule") != (steps is not None):
        raise UsageError("--steps and --rule schedule belong together")
    rules = {
        "localleap": LocalLeap(anchor_threshold, relaxed_threshold, radius),
        "threshold": Threshold(threshold),
        "fixed": FixedCount(tokens_per_step),
        "greedy": FixedCount(1),
    }
    return rules[name or "localleap"] if steps is None else Schedule.of(steps, gen_length, block_length)


def _prompts(given: list[str], file: Path | None) -> list[tuple[int, str]]:
    """Numbered prompts from the options, the file, or standard input."""
    if given and file is not None:
        raise UsageError("give --prompt or --prompts, not both")
    if given:
        texts = given
    elif file is None and sys.stdin.isatty():
        raise UsageError("no prompt: give --prompt, --prompts FILE, or one a line on standard input")
    else:
        texts = list(_lines(file))
    if not texts or not all(text.strip() for text in texts):
        raise UsageError("no prompt: there is nothing to complete" if not texts else "a prompt must not be empty")
    return list(enumerate(texts))


def _lines(file: Path | None) -> Iterator[str]:
    try:
        whole = sys.stdin.read() if file is None or str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"cannot read {file or 'standard input'}: it is not UTF-8 text") from None
    objects = file is not None and file.suffix == ".jsonl"
    for number, line in enumerate(whole.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        if not objects:
            yield line
            continue
        try:
            text = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UsageError(f'{file}, line {number}: no object with a text under "prompt"')
        yield text


def _settings(model_dir: Path, config: "DiffusionConfig", others: dict[str, Any]) -> str:
    """A digest of what decides the answers to given prompts, short enough for every line."""
    model = (model_dir / "config.json").read_text(encoding="utf-8")
    sizes = sorted((p.name, p.stat().st_size) for p in model_dir.glob("*.safetensors"))
    facts = json.dumps([model, sizes, repr(config), others], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _loaded(load: Any, model_dir: Path, dtype: str | None, device: str) -> Any:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return load(model_dir, dtype=None if dtype is None else getattr(torch, dtype), device=device)


def _quieten() -> None:
    """Transformers warns of model types that it does not know, which ours are."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _write(
    completions: "Iterator[Completion]", *, total: int, answers: AnswerFile | None, as_json: bool, streams: bool
) -> None:
    tokens = calls = done = 0
    start = time.perf_counter()
    for answer in completions:
        done, tokens, calls = done + 1, tokens + answer.tokens, calls + answer.calls
        facts = asdict(answer) | {"seconds": round(answer.seconds, 4)}
        if answers is not None:
            answers.add(facts)
        if as_json:
            print(json.dumps(facts, ensure_ascii=False), flush=True)
        elif answers is None:
            print("" if streams else answer.text, flush=True)
    seconds = time.perf_counter() - start
    if not as_json:
        again = "\r" if sys.stderr.isatty() and not streams else ""
        speed = f"{tokens / seconds:.1f} tokens/s, {tokens / max(calls, 1):.2f} tokens a call"
        print(f"{again}{done} of {total} prompts, {tokens} tokens, {seconds:.1f} s, {speed}", file=sys.stderr)


def _show_share(share: float) -> None:
    """On a terminal only: how much is done, in place."""
    if sys.stderr.isatty():
        print(f"\r{share:4.0%} ", end="", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(text, end="", flush=True)
