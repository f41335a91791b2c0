"""A tiny Llama learns to recall across its context, is converted, and recovers; time and memory of decoding.

The original and its conversion see the same text: a Markov chain that begins with a key, which is asked for far beyond
the attention window. The full-size study converts a checkpoint that the user has.
"""

import copy
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from locally.evidence import MissingData, Run

if TYPE_CHECKING:
    from locally.sequence.gated_linearization import Examples

LIGER, WINDOW, ORIGINAL = "Liger", "sliding window alone", "original (softmax)"
UNTRAINED = "Liger before recovery"
FILLERS, KEYS = 16, 16  # tokens 0 .. 15 and 16 .. 31
QUESTION = FILLERS + KEYS
ANSWER_WEIGHT = 20.0  # of the three answers among the chain's tokens, in the loss


@dataclass(frozen=True)
class Study:
    """Sizes of the set-up."""

    contexts: tuple[int, ...] = (256, 1024, 4096, 16384)
    timed_tokens: int = 48  # of the conversion; a quarter of the original's, which take longer
    length: int = 64
    window: int = 8  # two layers see 14 tokens back, the nearest question is 16 from the key
    hidden: int = 64
    teacher_steps: int = 200
    recovery_steps: int = 200
    batch: int = 16
    tested: int = 256
    longer: tuple[int, ...] = (64, 128, 256, 512)  # lengths at which both are read
    learns: bool = True


def experiment(run: Run) -> None:
    carry_out(run, run.pick(quick=Study(learns=False), default=Study(), paper=Study(timed_tokens=200)))
    if run.scale == "paper":
        full_size(run)


def carry_out(run: Run, study: Study) -> None:
    for seed in run.track(run.seeds, "decoding"):
        decode(run, study, seed)
    if study.learns:
        run.parallel(Recall(study), run.seeds, "recall")
    plot(run, study)


# Decoding -------------------------------------------------------------------------------------------------------------


def decode(run: Run, study: Study, seed: int) -> None:
    """Time and memory of one token after contexts of many lengths: the fastest of some, all lengths in turn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from locally.sequence.gated_linearization import LigerCache, LigerConfig, cache_bytes, linearize

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 512, "vocab_size": 64}
    config = LlamaConfig(num_attention_heads=8, max_position_embeddings=2**16, **sizes)
    original: Any = LlamaForCausalLM(config).eval()
    original.to(run.device)
    converted = linearize(original, LigerConfig(window=64))
    tokens = torch.randint(0, 64, (1, max(study.contexts)), device=run.device)
    caches: dict[tuple[str, int], Any] = {}
    with torch.no_grad():
        state = LigerCache(converted.config)  # one pass: at each context a copy of the memory so far
        for start, end in zip((0, *study.contexts), study.contexts):
            converted(tokens[:, start:end], cache=state, logits_to_keep=1)
            caches[LIGER, end] = copy.deepcopy(state)
        for context in study.contexts:
            caches[ORIGINAL, context] = filled(config, context, run.device)
        times: dict[tuple[str, int], list[float]] = {key: [] for key in caches}
        timed = study.timed_tokens
        for method, model, count in ((LIGER, converted, timed), (ORIGINAL, original, max(timed // 4, 1))):
            for step in range(count + 2):
                # back and forth: a long cache leaves the processor's own cache cold for whoever comes after it
                for context in study.contexts if step % 2 else reversed(study.contexts):
                    start_time = time.perf_counter()
                    model(tokens[:, step : step + 1], cache=caches[method, context])
                    if run.device != "cpu":
                        torch.cuda.synchronize()
                    if step >= 2:
                        times[method, context].append(time.perf_counter() - start_time)
    first, last = study.contexts[0], study.contexts[-1]
    for method in (LIGER, ORIGINAL):
        milliseconds = {context: 1e3 * min(times[method, context]) for context in study.contexts}
        held = {context: cache_bytes(caches[method, context]) for context in study.contexts}
        for context in study.contexts:
            run.record(method, "milliseconds per token", milliseconds[context], seed=seed, context=context)
            run.record(method, "decoding memory in KiB", held[context] / 1024, seed=seed, context=context)
        ratio = milliseconds[last] / milliseconds[first]
        run.record(method, f"time per token at {last} tokens / at {first} tokens", ratio, seed=seed)
        run.record(method, f"decoding memory at {last} tokens / at {first} tokens", held[last] / held[first], seed=seed)


def filled(config: Any, context: int, device: str) -> Any:
    """A cache of random keys and values: what a step costs does not depend on them."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, context, config.head_dim)
        cache.update(torch.randn(shape, device=device), torch.randn(shape, device=device), layer)
    return cache


# Recall ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recall:
    """One seed: an original is trained, converted with recurrence and window and with the window alone, and both are
    recovered alike."""

    study: Study

    def __call__(self, run: Run, seed: int) -> None:
        from locally.sequence.gated_linearization import LigerConfig, Schedule, fit_lora, linearize

        study, generator = self.study, torch.Generator().manual_seed(seed)
        text = Text(generator)
        original = teacher(study, text, seed, run.device)
        test = {length: text.draw(study.tested * study.length // length, length) for length in study.longer}
        train = text.draw(study.recovery_steps * study.batch, study.length)
        base = report(run, ORIGINAL, original, test, seed, None)
        schedule = Schedule(
            lr=5e-3, epochs=1, batch_size=study.batch, accumulation=1, decay="cosine", warmup=20, seed=seed
        )
        for name, alpha in ((LIGER, 0.5), (WINDOW, 0.0)):
            converted = linearize(original, LigerConfig(window=study.window, alpha=alpha, beta=1 - alpha))
            if name == LIGER:
                report(run, UNTRAINED, converted, test, seed, base)
            recovered = fit_lora(converted, train, None, schedule).merged()
            found = report(run, name, recovered, test, seed, base)
            ratio = found[study.length] / base[study.length]
            run.record(name, "perplexity / teacher's perplexity, recall task", ratio, seed=seed)


class Text:
    """A chain of 16 states whose first token is one of 16 keys; three questions later on are answered by the key."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.transitions = (2 * torch.randn(FILLERS, FILLERS, generator=generator)).softmax(-1)

    def draw(self, count: int, length: int) -> "Examples":
        """Questions stand within four positions from each quarter of the length."""
        from locally.sequence.gated_linearization import Examples

        tokens = torch.empty(count, length, dtype=torch.long)
        state = torch.randint(0, FILLERS, (count,), generator=self.generator)
        for t in range(length):
            state = torch.multinomial(self.transitions[state], 1, generator=self.generator).squeeze(-1)
            tokens[:, t] = state
        key = FILLERS + torch.randint(0, KEYS, (count,), generator=self.generator)
        tokens[:, 0] = key
        weights = torch.ones(count, length)
        every = torch.arange(count)
        for quarter in (1, 2, 3):
            at = quarter * length // 4 + torch.randint(0, 4, (count,), generator=self.generator)
            tokens[every, at], tokens[every, at + 1] = QUESTION, key
            weights[every, at + 1] = ANSWER_WEIGHT
        return Examples(tokens, None, weights)


def teacher(study: Study, text: Text, seed: int, device: str) -> Any:
    """A Llama of two layers, trained on the task in place, saved and read again as a user's checkpoint would be."""
    import tempfile

    from transformers import LlamaConfig, LlamaForCausalLM

    from locally.sequence import checkpoints

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=QUESTION + 1,
        hidden_size=study.hidden,
        intermediate_size=2 * study.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(device)
    data = text.draw(study.teacher_steps * study.batch, study.length)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    rate = lambda step: min((step + 1) / 20, (1 + math.cos(math.pi * step / study.teacher_steps)) / 2)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(study.teacher_steps):
        batch = data[slice(step * study.batch, (step + 1) * study.batch)]
        labels, weights = (x.to(device) for x in batch.targets())
        logits = model(batch.tokens.to(device), use_cache=False).logits[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        optimizer.zero_grad()
        ((losses * weights).sum() / weights.sum()).backward()
        optimizer.step()
        decay.step()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return checkpoints.read(folder, device=device).model


def report(
    run: Run, method: str, model: Any, test: dict[int, "Examples"], seed: int, base: dict[int, float] | None
) -> dict[int, float]:
    """Perplexity of the chain and answers over lengths, of which the first is the trained one; perplexities come back.

    `base` are the original's.
    """
    found: dict[int, float] = {}
    for length, examples in test.items():
        found[length], accuracy = scores(model, examples)
        run.record(method, "perplexity", found[length], seed=seed, length=length)
        relative = found[length] / (found if base is None else base)[length]
        run.record(method, "perplexity / original's", relative, seed=seed, length=length)
        run.record(method, "answer accuracy over length", accuracy, seed=seed, length=length)
        if len(found) == 1:
            run.record(method, "answer accuracy beyond the window", accuracy, seed=seed)
    return found


@torch.no_grad()
def scores(model: Any, examples: "Examples") -> tuple[float, float]:
    """Perplexity of the chain's tokens, which the original knew before it was converted, and share of right answers."""
    device = next(model.parameters()).device
    labels, weights = examples.targets()
    logits = model.eval()(examples.tokens.to(device), use_cache=False).logits[:, :-1].cpu()
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    right = (logits.argmax(-1) == labels)[weights == ANSWER_WEIGHT]
    return math.exp(float(losses[labels < FILLERS].mean())), float(right.double().mean())


# Full size ------------------------------------------------------------------------------------------------------------

# accuracy by log-likelihood, of ARC-Challenge and HellaSwag per byte of the choice, as is usual for these tasks
TASKS = {"piqa": False, "arc_easy": False, "arc_challenge": True, "hellaswag": True, "winogrande": False, "mmlu": False}


def full_size(run: Run) -> None:
    """Convert the user's Llama-3-8B with the paper's settings and score it on the user's copies of the tasks."""
    from locally.sequence import checkpoints
    from locally.sequence.gated_linearization import LigerConfig, Schedule, fit_lora, linearize, read_examples

    folder = run.data("Meta-Llama-3-8B", "the checkpoint in Transformers' format")
    instructions = run.data("alpaca_data_cleaned.json", "the instructions of recovery training")
    tasks = {name: run.data(f"tasks/{name}.jsonl", "query, choices and gold of each question") for name in TASKS}
    checkpoint = checkpoints.read(folder, device=run.device)
    original, tokenizer = checkpoint.model, checkpoint.tokenizer
    if tokenizer is None:
        raise MissingData(f"{folder} has no tokenizer")
    record_scores(run, ORIGINAL, original, tokenizer, tasks, None)
    length = min(1024, int(original.config.max_position_embeddings))
    train, validation = read_examples(instructions, tokenizer, length, held_out=0.004)
    for seed in run.track(run.seeds[:1], "recovery"):
        converted = linearize(original, LigerConfig())
        recovered = fit_lora(converted, train, validation, Schedule(seed=seed)).merged()
        record_scores(run, LIGER, recovered, tokenizer, tasks, None)


def record_scores(run: Run, method: str, model: Any, tokenizer: Any, tasks: dict[str, Path], seed: int | None) -> None:
    scores = []
    for name, path in run.track(list(tasks.items()), f"tasks, {method}"):
        scores.append(100 * accuracy(model, tokenizer, questions(path), TASKS[name]))
        run.record(method, "score in percent", scores[-1], seed=seed, task=name)
    run.record(method, "mean score over six benchmarks in percent, Llama-3-8B", statistics.fmean(scores), seed=seed)


def questions(path: Path) -> list[tuple[str, list[str], int]]:
    found = []
    for number, line in enumerate(filter(str.strip, path.read_text(encoding="utf-8").splitlines()), 1):
        try:
            record = json.loads(line)
            found.append((str(record["query"]), [str(c) for c in record["choices"]], int(record["gold"])))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise MissingData(f"line {number} of {path} is no question (query, choices, gold): {error!r}") from None
    if not found:
        raise MissingData(f"{path} holds no question")
    return found


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, asked: Sequence[tuple[str, list[str], int]], per_byte: bool) -> float:
    """Share of questions whose right choice has the largest log-likelihood after the query."""
    device = next(model.parameters()).device
    right = 0
    for query, choices, gold in asked:
        context = tokenizer(query)["input_ids"]
        scores = []
        for choice in choices:
            whole = tokenizer(query + " " + choice)["input_ids"]
            ids = torch.tensor([whole], device=device)
            logits = model(ids, use_cache=False).logits[0, len(context) - 1 : -1].float()
            likelihood = -float(cross_entropy(logits, ids[0, len(context) :], reduction="sum"))
            scores.append(likelihood / (len(choice.encode()) if per_byte else 1))
        right += scores.index(max(scores)) == gold
    return right / len(asked)


# Figure ---------------------------------------------------------------------------------------------------------------


def plot(run: Run, study: Study) -> None:
    from locally.plots import PALETTE, canvas

    panels: list[tuple[str, str, str, str]] = [
        ("decoding memory in KiB", "context", "Memory of decoding", "tokens of context"),
        ("milliseconds per token", "context", "Time of a token", "tokens of context"),
    ]
    if study.learns:
        panels += [
            ("perplexity / original's", "length", "Perplexity of the chain", "tokens of text"),
            ("answer accuracy over length", "length", "Recall beyond the window", "tokens of text"),
        ]
    figure, axes = canvas(2.9 * len(panels) + 0.6, 3.8, ncols=len(panels))
    colours = dict(zip((LIGER, ORIGINAL, WINDOW, UNTRAINED), PALETTE))
    for panel, (metric, x, title, label) in zip(axes, panels):
        points: dict[str, dict[float, list[float]]] = {}
        for m in run.measures:
            if m.metric == metric:
                points.setdefault(m.method, {}).setdefault(float(m.setting[x]), []).append(m.value)
        for method in (name for name in colours if name in points):
            at = sorted(points[method])
            means = [statistics.fmean(points[method][p]) for p in at]
            panel.plot(at, means, marker="o", markersize=3.5, color=colours[method], label=method)
            low, high = ([f(points[method][p]) for p in at] for f in (min, max))
            panel.fill_between(at, low, high, color=colours[method], alpha=0.15, lw=0)
        panel.set(xscale="log", title=title, xlabel=label, ylabel=metric)
        panel.set_xticks(at, [f"{p:g}" for p in at])
        panel.minorticks_off()
        if x == "context":
            panel.set_yscale("log")
        if x == "length":
            panel.axvline(study.length, color=PALETTE[7], lw=1, ls=":")
    handles = {text: line for panel in axes for line, text in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    caption = (
        "Mean over seeds, band from the lowest to the highest. Decoding: fastest of some tokens, the original with"
        " Transformers' growing cache."
    )
    if study.learns:
        caption += f" Models were trained on texts of {study.length} tokens (dotted); a key stands at their beginning."
    run.figure(figure, "length", caption)
