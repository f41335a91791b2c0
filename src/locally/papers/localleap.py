"""Decoding rules on a masked diffusion model that is trained here to write running sums, and on LLaDA and Dream.

The model fills in a_1, s_1, a_2, s_2, ... with two digits a sum, given the numbers a_k; a response can be checked token
by token and by its last sum. All rules decode the same prompts with the same model; one model and one set of prompts a
seed. The full-size study reads checkpoints and benchmarks that the user names, and measures calls and tokens a second.
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from locally.errors import require
from locally.evidence import MissingData, Run
from locally.sequence.diffusion_decoding import (
    CommitRule,
    DiffusionConfig,
    FixedCount,
    LanguageModel,
    LocalLeap,
    Threshold,
    analyze_delayed_decoding,
    build,
    complete,
    diffusion_generate,
    load,
)

OURS, GREEDY, FAST = "LocalLeap", "one token per call", "confidence threshold 0.9 (Fast-dLLM)"
RULES: Mapping[str, CommitRule] = {
    OURS: LocalLeap(0.9, 0.75, 4),
    GREEDY: FixedCount(1),
    "2 tokens per call": FixedCount(2),
    "4 tokens per call": FixedCount(4),
    "8 tokens per call": FixedCount(8),
    FAST: Threshold(0.9),
    "confidence threshold 0.75": Threshold(0.75),
}
ABLATIONS: Mapping[str, CommitRule] = {
    **{f"LocalLeap, radius {W}": LocalLeap(0.9, 0.75, W) for W in (0, 1, 2, 8, 16)},
    **{f"LocalLeap, relaxed threshold {r}": LocalLeap(0.9, r, 4) for r in (0.5, 0.6, 0.7, 0.8, 0.9)},
    **{f"LocalLeap, anchor threshold {a}": LocalLeap(a, min(0.75, a), 4) for a in (0.7, 0.8, 0.95)},
}
CACHES: tuple[Literal["prefix", "dual"] | None, ...] = (None, "prefix", "dual")
EQUALS, MASK, VOCABULARY = 11, 13, 14  # the digits come first


@dataclass(frozen=True)
class Study:
    """Sizes of one scale."""

    numbers: int = 8  # to add up
    largest: int = 5  # each is uniform in 1 .. largest
    width: int = 64
    layers: int = 2
    steps: int = 800  # of training
    batch: int = 32
    learning_rate: float = 3e-3
    prompts: int = 150
    ablations: bool = True
    maxima_steps: int = 250  # of training the LLaDA stack for the caches; 0 leaves them out

    @property
    def length(self) -> int:
        return 3 * self.numbers


def experiment(run: Run) -> None:
    chain_of_certain_dependencies(run)
    study = run.pick(
        quick=Study(3, 3, 32, layers=1, steps=200, learning_rate=1e-2, prompts=60, ablations=False, maxima_steps=0),
        default=Study(),
        paper=None,
    )
    if study is None:
        full_size(run)
    else:
        carry_out(run, study)


def carry_out(run: Run, study: Study) -> None:
    tasks: list[tuple[Callable[..., Any], Study, int]] = [(trained_and_decoded, study, s) for s in run.seeds]
    if study.maxima_steps:
        tasks += [(with_caches, study, s) for s in run.seeds]
    curves = run.parallel(do, tasks, "models")
    plot(run, study, curves[: len(run.seeds)])


def do(run: Run, task: tuple[Callable[[Run, Study, int], Any], Study, int]) -> Any:
    carry, study, seed = task
    return carry(run, study, seed)


# Running sums -------------------------------------------------------------------------------------------------------


def draw(
    study: Study, count: int, generator: torch.Generator
) -> tuple[Int[Tensor, "count prompt"], Int[Tensor, "count response"]]:
    """Prompts a_1 ... a_K = and the responses a_1 s_1 a_2 s_2 ... with the sums as two digits."""
    a = torch.randint(1, study.largest + 1, (count, study.numbers), generator=generator)
    sums = a.cumsum(1)
    response = torch.stack([a, sums // 10, sums % 10], -1).flatten(1)
    return torch.cat([a, torch.full((count, 1), EQUALS)], 1), response


def train(study: Study, seed: int, device: str) -> nn.Module:
    """A BERT that fills in any part of a response."""
    transformers = require("transformers", "llm")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=study.width,
        num_hidden_layers=study.layers,
        num_attention_heads=4,
        intermediate_size=2 * study.width,
        max_position_embeddings=study.numbers + 1 + study.length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,
        mask_token_id=MASK,
    )
    model = transformers.BertForMaskedLM(config).to(device)
    fit(model, partial(draw, study), study.steps, study, seed, device)
    return model


def fit(
    model: nn.Module, draw_some: Callable[..., tuple[Tensor, Tensor]], steps: int, study: Study, seed: int, device: str
) -> None:
    """Cross-entropy of masked tokens over the masking rate (LLaDA)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), study.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, study.learning_rate, steps, pct_start=0.1, cycle_momentum=False, final_div_factor=2
    )
    model.train()
    for _ in range(steps):
        prompt, response = draw_some(study.batch, generator)
        rate = 0.05 + 0.95 * torch.rand(study.batch, 1, generator=generator)
        masked = torch.rand(response.shape, generator=generator) < rate
        out = model(torch.cat([prompt, response.masked_fill(masked, MASK)], 1).to(device))
        logits = getattr(out, "logits", out)[:, prompt.shape[1] :]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), response.to(device), reduction="none")
        optimizer.zero_grad()
        (loss * (masked / rate).to(device)).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def trained_and_decoded(run: Run, study: Study, seed: int) -> tuple[list[float], list[float]]:
    """Train, save, load, decode by every rule; curves of how many tokens are final and committed after each call."""
    folder = run.scratch / f"model-{seed}"
    train(study, seed, run.device).save_pretrained(folder)  # type: ignore[operator]
    model = load(folder, device=run.device).model
    prompts, wanted = draw(study, study.prompts, torch.Generator().manual_seed(9900 + seed))
    prompts, wanted = prompts.to(run.device), wanted.to(run.device)
    outputs, seconds = {}, {}
    for name, rule in ({**RULES, **ABLATIONS} if study.ablations else RULES).items():
        start = time.perf_counter()
        outputs[name] = diffusion_generate(model, prompts, DiffusionConfig(study.length, study.length, rule))
        seconds[name] = time.perf_counter() - start
    calls, accuracy, sequential = {}, {}, outputs[GREEDY].responses
    for name, out in outputs.items():
        right = out.responses == wanted
        calls[name] = float(out.nfe.double().mean())
        accuracy[name] = share(right[:, -2:])
        record = partial(run.record, name, seed=seed)
        record("model calls / response length", calls[name] / study.length)
        record("final-answer accuracy", accuracy[name])
        record("share of responses without an error", share(right))
        record("share of responses equal to those of one token per call", share(out.responses == sequential))
        record("tokens per second", study.prompts * study.length / seconds[name])
    run.record(OURS, "model calls / those of the confidence threshold", calls[OURS] / calls[FAST], seed=seed)
    run.record(
        OURS, "final-answer accuracy minus that of one token per call", accuracy[OURS] - accuracy[GREEDY], seed=seed
    )
    return delay(run, model, prompts, study, seed)


def share(right: Tensor) -> float:
    """Of rows that are True throughout."""
    return float(right.all(1).double().mean())


def delay(run: Run, model: nn.Module, prompts: Tensor, study: Study, seed: int) -> tuple[list[float], list[float]]:
    found = analyze_delayed_decoding(model, prompts, DiffusionConfig(study.length, study.length))
    mean = float(found.delay.double().mean()) / study.length
    run.record(GREEDY, "mean steps between final prediction and commitment / response length", mean, seed=seed)
    for where, distances in (("within 4 of a sure one", slice(0, 4)), ("farther from a sure one", slice(4, None))):
        hits, pairs = found.agreement.hits[-1, distances].sum(), found.agreement.pairs[-1, distances].sum()
        if pairs:
            run.record(GREEDY, f"agreement of unsure predictions {where}", float(hits / pairs), seed=seed)
    after = torch.arange(study.length, device=found.first_stable.device)[:, None, None]
    final = (found.first_stable <= after).double().mean((1, 2)).tolist()
    committed = (found.commit_step <= after).double().mean((1, 2)).tolist()
    return final, committed


def with_caches(run: Run, study: Study, seed: int, length: int = 16) -> None:
    """What caches cost in quality: a LLaDA stack that writes running maxima of digits, in blocks of four tokens."""

    def maxima(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        digits = torch.randint(0, 10, (count, length), generator=generator)
        return digits, digits.cummax(1).values

    sizes = {"d_model": study.width, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 2 * study.width}
    tokens = {"vocab_size": VOCABULARY, "mask_token_id": MASK, "max_sequence_length": 2 * length}
    torch.manual_seed(seed)
    model = build({"architectures": ["LLaDAModelLM"], **sizes, **tokens}).to(run.device)
    fit(model, maxima, study.maxima_steps, study, seed, run.device)
    prompts, wanted = (x.to(run.device) for x in maxima(study.prompts, torch.Generator().manual_seed(9900 + seed)))
    for name in (OURS, GREEDY, FAST):
        for cache in CACHES:
            out = diffusion_generate(model, prompts, DiffusionConfig(length, 4, RULES[name], cache=cache))
            record = partial(run.record, name, seed=seed, cache=cache or "none")
            record("running maxima: share of responses without an error", share(out.responses == wanted))
            record("running maxima: model calls / response length", float(out.nfe.double().mean()) / length)


def chain_of_certain_dependencies(run: Run, length: int = 24) -> None:
    """A token is certain beside a known one on its left and unknown elsewhere: nothing can be gained, or lost."""

    def model(ids: Tensor) -> Tensor:
        left = nn.functional.pad(ids, (1, 0))[:, :-1]
        logits = 40.0 * nn.functional.one_hot((left + 1) % MASK, VOCABULARY).double()
        return logits * (left != MASK)[..., None]

    config = DiffusionConfig(length, length, RULES[OURS], mask_token_id=MASK)
    out = diffusion_generate(model, torch.tensor([[3]], device=run.device), config)
    ratio = int(out.nfe[0]) / length
    run.record(OURS, "model calls / response length, each token certain only after the one before", ratio)


def plot(run: Run, study: Study, curves: Sequence[tuple[list[float], list[float]]]) -> None:
    from locally.plots import canvas

    figure, (left, right) = canvas(width=10.0, ncols=2)
    mean = lambda name, metric: average([m.value for m in run.measures if (m.method, m.metric) == (name, metric)])
    for name in RULES:
        x = study.length * mean(name, "model calls / response length")
        marker = {OURS: "*", GREEDY: "s", FAST: "D"}.get(name, "o")
        left.plot(
            x, mean(name, "final-answer accuracy"), marker, markersize=13 if name == OURS else 7, label=name, alpha=0.9
        )
    left.set(
        ylim=(0, 1.03), xscale="log", xlabel="model calls per response", ylabel="final-answer accuracy", title="Rules"
    )
    ticks = [t for t in (1, 2, 4, 8, 12, 24) if t <= study.length]
    left.set_xticks(ticks, [str(t) for t in ticks])
    left.minorticks_off()
    left.legend(fontsize=8, loc="lower center")
    after = range(1, study.length + 1)
    for i, label in enumerate(("prediction final", "committed")):
        right.plot(after, [average([c[i][k - 1] for c in curves]) for k in after], label=label)
    right.set(xlabel="calls, one token each", ylabel="share of tokens", ylim=(0, 1.03), title="Delayed decoding")
    right.legend()
    caption = f"Running sums of {study.numbers} numbers, {study.length} tokens, means over {len(run.seeds)} models."
    run.figure(figure, "rules-and-delay", caption)


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# Checkpoints and benchmarks of the user -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """A file of one JSON object a line: where the question stands, where the answer, how a question is put."""

    question: str
    answer: str | None  # None: answers are programs, which are not run here
    ask: str = "{}"


BENCHMARKS: Mapping[str, Benchmark] = {
    "gsm8k.jsonl": Benchmark("question", "answer", "{}\nEnd with the final number after ####."),
    "math.jsonl": Benchmark("problem", "answer", "{}\nPut the final answer into \\boxed{{}}."),
    "humaneval.jsonl": Benchmark("prompt", None, "Complete this Python function.\n{}"),
    "mbpp.jsonl": Benchmark("text", None, "{}\nWrite a Python function."),
}
CHECKPOINTS = ("LLaDA-8B-Instruct", "Dream-v0-Instruct-7B")
# Rules of the full-size study, each with the cache that it is run with.
FULL_RULES: Mapping[str, tuple[CommitRule, Literal["prefix", "dual"] | None]] = {
    **{name: (RULES[name], None) for name in (GREEDY, "2 tokens per call", FAST, OURS)},
    **{f"{name}, {cache} cache": (RULES[name], cache) for name in (FAST, OURS) for cache in ("prefix", "dual")},
}


def full_size(run: Run, *, gen_length: int = 256, block_length: int = 32, questions: int = 500) -> None:
    """Each checkpoint on each benchmark in the data folder, prompt by prompt: calls, tokens a second, answers."""
    models = [run.data(f"models/{name}", "a checkpoint with its tokenizer") for name in CHECKPOINTS]
    files = [run.data_folder / name for name in BENCHMARKS if (run.data_folder / name).exists()]  # type: ignore[operator]
    if not files:
        raise MissingData(f"{run.data_folder} holds none of {', '.join(BENCHMARKS)}")
    asked = {file: read_questions(file, questions) for file in files}
    speedups = []
    for folder in run.track(models, "checkpoints"):
        language = load(folder, dtype=torch.bfloat16 if run.device != "cpu" else None, device=run.device)
        for file in run.track(files, "benchmarks"):
            speed = {}
            for name, (rule, cache) in run.track(FULL_RULES.items(), "rules", len(FULL_RULES)):
                ends = language.eos_token_id is not None
                config = DiffusionConfig(gen_length, block_length, rule, cache=cache, early_stop=ends)
                speed[name] = on_benchmark(run, name, language, file, asked[file], config)
            speedups.append(speed[OURS] / speed[GREEDY])
            setting: dict[str, Any] = {"model": folder.name, "benchmark": file.stem}
            run.record(OURS, "throughput / that of one token per call", speedups[-1], **setting)
    run.record(OURS, "largest throughput / that of one token per call, over the benchmarks", max(speedups))
    run.plot_bars("tokens per second")


def on_benchmark(
    run: Run,
    name: str,
    language: LanguageModel,
    file: Path,
    asked: Sequence[Mapping[str, Any]],
    config: DiffusionConfig,
) -> float:
    """Tokens a second of one rule."""
    layout = BENCHMARKS[file.name]
    setting: dict[str, Any] = {"model": language.folder.name, "benchmark": file.stem}
    chat = bool(getattr(language.tokenizer, "chat_template", None))
    prompts = [(i, layout.ask.format(q[layout.question])) for i, q in enumerate(asked)]
    given = list(run.track(complete(language, prompts, config, chat=chat), "questions", len(prompts)))
    tokens, seconds = sum(c.tokens for c in given), sum(c.seconds for c in given)
    run.record(name, "tokens per second", tokens / seconds, **setting)
    run.record(name, "model calls / response length", sum(c.calls for c in given) / tokens, **setting)
    if layout.answer is not None:
        right = [final_answer(c.text) == final_answer(str(q[layout.answer])) for c, q in zip(given, asked, strict=True)]
        run.record(name, "final-answer accuracy", average(right), **setting)
    return tokens / seconds


def read_questions(file: Path, at_most: int) -> list[dict[str, Any]]:
    layout, questions = BENCHMARKS[file.name], []
    fields = [layout.question] + ([layout.answer] if layout.answer else [])
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()[:at_most], 1):
        try:
            question = json.loads(line)
        except json.JSONDecodeError:
            question = None
        if not isinstance(question, dict) or not all(field in question for field in fields):
            raise MissingData(f"{file}, line {number}: no object with {' and '.join(fields)}")
        questions.append(question)
    if not questions:
        raise MissingData(f"{file} is empty")
    return questions


def final_answer(text: str) -> str:
    """What the last \\boxed{} holds, or what follows the last ####, or the last number; without spaces and commas."""
    boxed = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if boxed:
        found = boxed[-1]
    elif "####" in text:
        found = text.rsplit("####", 1)[1].strip().split("\n")[0]
    else:
        found = numbers[-1] if numbers else text
    return re.sub(r"[\s,$]", "", found).rstrip(".")
