"""Perplexity of a small Llama after structured pruning: searched shares beside equal ones and what others do.

Two models are trained here, on the manual's topics that come with Python, one character a token; a seed draws
calibration windows for one of them and mutants for the search. All methods remove the same number of heads and of
neurons with the same windows; perplexity is on text that neither training nor calibration has seen.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from locally.evidence import Run
from locally.sequence.checkpoints import read_tokenizer
from locally.sequence.structured_pruning import (
    InputStatistics,
    Network,
    TyrPruner,
    compress,
    local_prune,
    log_likelihoods,
    open_network,
    perplexity,
    prune_uniform,
    read_windows,
    size_of,
    tokens_per_second,
)

TYR, UNIFORM, FLAP, LOCAL = "Týr-the-Pruner", "uniform local pruning", "FLAP", "local pruning with refit"
BASELINES = {
    UNIFORM: "local",
    "uniform optimal brain surgeon (ZipLM)": "obs",
    FLAP: "flap",
    "Wanda-sp": "wanda-sp",
    "magnitude": "magnitude",
    "layer dropping (ShortGPT)": "layer-drop",
}
SHARES = {0.125: "an eighth", 0.25: "a quarter", 0.375: "three eighths", 0.5: "half"}
VOCABULARY, CHUNK, HELD_OUT_EVERY = 128, 2048, 10
CHECKPOINT, TEXT, TASKS = "Llama-3.1-70B", "fineweb-edu.txt", "tasks"


@dataclass(frozen=True)
class Study:
    """The models, their training, and how they are pruned."""

    sparsities: tuple[float, ...]  # with the first seed of each model, by all methods
    decisive: tuple[float, ...] = (0.25, 0.5)  # with the other seeds, by what the claims name
    models: int = 2
    layers: int = 4
    hidden: int = 64
    neurons: int = 128
    heads: int = 8
    steps: int = 550
    batch: int = 8
    learning_rate: float = 1e-2
    length: int = 128
    calibration: int = 64  # windows
    search_windows: int = 96
    held_out: int = 64
    iterations: int = 2
    generations: int = 6
    offspring: int = 20
    survivors: tuple[int, ...] = (5, 2, 1)
    stages: tuple[int, ...] = (2, 8, 16)  # windows


def experiment(run: Run) -> None:
    if run.scale == "paper":
        full_size(run)
        return
    study = run.pick(
        quick=Study((), models=1, layers=2, steps=60, held_out=16),
        default=Study((0.125, 0.25, 0.375, 0.5)),
        paper=Study(()),
    )
    groups = [(model, run.seeds[model :: study.models]) for model in range(study.models)]
    groups = [group for group in groups if group[1]]
    if len(groups) == 1:
        one_model(run, groups[0], study=study)
    else:
        run.parallel(partial(one_model, study=study), groups, "models")
    if study.sparsities:
        figure(run)


def one_model(run: Run, group: tuple[int, Sequence[int]], *, study: Study) -> None:
    """Train a model, then prune it with every seed."""
    number, seeds = group
    training, held_out = text()
    model = train(training, study, number).to(run.device)
    unseen = windows(held_out, study.length, study.held_out, np.random.default_rng(0))
    dense = perplexity(model, unseen, batch=16)
    for seed in run.track(seeds, f"pruning model {number}"):
        rng = np.random.default_rng(seed)
        calibration = windows(training, study.length, study.calibration, rng)
        searched = windows(training, study.length, study.search_windows, rng)
        local_errors(run, model, calibration, unseen, seed)
        if study.sparsities:
            first = seed == seeds[0]
            for sparsity in study.sparsities if first else study.decisive:
                one_sparsity(run, study, model, dense, calibration, searched, unseen, sparsity, seed, complete=first)


def one_sparsity(
    run: Run,
    study: Study,
    model: Any,
    dense: float,
    calibration: Tensor,
    searched: Tensor,
    unseen: Tensor,
    sparsity: float,
    seed: int,
    *,
    complete: bool,
) -> None:
    """Every method at one sparsity, from the same windows; unless `complete`, those of the claims, and no clock.

    `dense` is the perplexity of the whole model.
    """
    plans: dict[str, Any] = {
        name: prune_uniform(model, calibration, sparsity, method=method, batch=16)
        for name, method in BASELINES.items()
        if complete or name in (UNIFORM, FLAP)
    }
    pruner = TyrPruner(
        sparsity,
        iterations=study.iterations,
        generations=study.generations,
        offspring=study.offspring,
        survivors=study.survivors,
        tokens_per_stage=tuple(study.length * count for count in study.stages),
        least_steps=(1, 1),
        batch=16,
        random_state=seed,
    ).fit(model, calibration, searched)
    plans[TYR] = pruner.plan_
    found = {name: perplexity(model, unseen, plan=plan, batch=16) for name, plan in plans.items()}
    for name, value in {"dense": dense, **found}.items():
        run.record(name, "perplexity", value, seed=seed, sparsity=sparsity)
    share = f"{SHARES[sparsity]} removed"
    record = partial(run.record, TYR, seed=seed)
    record(f"perplexity / that of uniform local pruning, {share}", found[TYR] / found[UNIFORM])
    record(f"perplexity / FLAP's, {share}", found[TYR] / found[FLAP])
    excess = (found[TYR] - dense) / (found[UNIFORM] - dense)
    record(f"excess over dense / that of uniform local pruning, {share}", excess)
    run.record(UNIFORM, f"perplexity / dense, {share}", found[UNIFORM] / dense, seed=seed)
    small = size_of(model, pruner.plan_).block_parameters / size_of(model).block_parameters
    record("block parameters / dense", small, sparsity=sparsity)
    for sublayer, removed in pruner.sparsity_.items():
        _, block, kind = sublayer.split(".")
        record(f"share of {kind} removed", removed, sparsity=sparsity, block=int(block))
    if complete:
        before, after = (tokens_per_second(m, unseen[:1]) for m in (model, compress(model, pruner.plan_)))
        for what in ("prefill", "decode"):
            speed, of_dense = getattr(after, what), getattr(before, what)
            record(f"tokens per second, {what}", speed, sparsity=sparsity)
            record(f"tokens per second / dense, {what}", speed / of_dense, sparsity=sparsity)


def local_errors(run: Run, model: Any, calibration: Tensor, unseen: Tensor, seed: int) -> None:
    """Squared change of each sub-layer's output on unseen text, half its groups gone; inputs of the dense model."""
    network = open_network(model)
    fitted, tested = (gram_matrices(network, ids) for ids in (calibration, unseen))
    for sublayer in network.sublayers():
        block = model.model.layers[sublayer.block]
        heads = sublayer.kind == "heads"
        W = (block.self_attn.o_proj if heads else block.mlp.down_proj).weight.detach().mT
        groups, keep = sublayer.groups, sublayer.groups // 2
        H, H_test = fitted[sublayer.name], tested[sublayer.name]
        refitted = local_prune(H, W, groups=groups, keep=keep, rounds=None if heads else 16).weight
        norms = W.reshape(groups, -1).square().sum(1)
        kept = torch.zeros(groups, dtype=torch.bool).index_fill(0, norms.argsort(descending=True)[:keep], True)
        masked = W * kept.repeat_interleave(len(W) // groups).unsqueeze(1)
        errors = [float((change * (H_test @ change)).sum()) for change in (refitted - W, masked - W)]
        metric = "layer output error / that of magnitude pruning"
        run.record(LOCAL, metric, errors[0] / errors[1], seed=seed, block=sublayer.block, kind=sublayer.kind)


def gram_matrices(network: Network, ids: Tensor) -> dict[str, Tensor]:
    """X^T X of the inputs of every output projection, by the sub-layer's name."""
    hidden, found = network.embed(ids), {}
    for b in range(network.depth):
        block = network.block(b)
        hooks = []
        for kind, output in (("heads", block.self_attn.o_proj), ("neurons", block.mlp.down_proj)):
            statistics = InputStatistics(output.in_features)
            found[f"blocks.{b}.{kind}"] = statistics.gram
            add = partial(lambda sums, _module, given: sums.add(given[0]), statistics)
            hooks.append(output.register_forward_pre_hook(add))
        hidden = network.run(b, block, hidden)
        for hook in hooks:
            hook.remove()
    return {name: gram for name, gram in found.items() if gram is not None}


def figure(run: Run) -> None:
    """Perplexity over what is removed, and which blocks lose how much."""
    from locally.plots import PALETTE, canvas

    drawn, (left, right) = canvas(10.5, 4.2, ncols=2)
    order = [TYR, *BASELINES, "dense"]
    for colour, name in zip(PALETTE, order):
        points: dict[Any, list[float]] = {}
        for m in run.measures:
            if m.metric == "perplexity" and m.method == name:
                points.setdefault(m.setting["sparsity"], []).append(m.value)
        at = sorted(points)
        style = {"ls": ":"} if name == "dense" else {"marker": "o", "ms": 3.5}
        left.plot(at, [np.mean(points[s]) for s in at], color=colour, label=name, **style)
        left.fill_between(
            at, [min(points[s]) for s in at], [max(points[s]) for s in at], color=colour, alpha=0.15, lw=0
        )
    left.set(yscale="log", xlabel="share of heads and neurons removed", ylabel="perplexity per character, unseen text")
    left.set(title="What is lost")
    left.legend(fontsize=8)
    for offset, colour, kind in ((-0.2, PALETTE[0], "heads"), (0.2, PALETTE[1], "neurons")):
        shares: dict[Any, list[float]] = {}
        for m in run.measures:
            if m.metric == f"share of {kind} removed" and m.setting["sparsity"] == 0.5:
                shares.setdefault(m.setting["block"], []).append(m.value)
        blocks = sorted(shares)
        right.bar([b + offset for b in blocks], [np.mean(shares[b]) for b in blocks], 0.36, color=colour, alpha=0.55)
        for b in blocks:
            right.plot([b + offset] * len(shares[b]), shares[b], "o", ms=3.5, color=colour, label=None if b else kind)
    right.axhline(0.5, ls=":", color="#888888")
    right.set(xlabel="block", ylabel="share removed", ylim=(0, 1), title="What the search takes, half removed in all")
    right.set_xticks(blocks)
    right.legend()
    run.figure(
        drawn, "perplexity-and-shares", "Mean over seeds, bands and dots for single ones; dotted right: equal shares."
    )


# The full-size study --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FullSize:
    """The paper's settings."""

    length: int = 4096
    sequences: int = 1024
    settings: tuple[tuple[str, Any], ...] = (("iterations", 4), ("fitness", "topk_kl"))


def full_size(run: Run, study: FullSize | None = None) -> None:
    """Accuracy of the user's checkpoint on the user's tasks, dense and with half of heads and neurons gone."""
    study = study or FullSize()
    folder = run.data(CHECKPOINT, "the checkpoint's folder, with its tokenizer")
    corpus = run.data(TEXT, "calibration text, UTF-8")
    tasks = sorted(run.data(TASKS, 'files NAME.jsonl with {"context", "choices", "answer"} a line').glob("*.jsonl"))
    network, tokenizer = open_network(folder, device=run.device), read_tokenizer(folder)
    ids = read_windows(corpus, tokenizer, network, length=study.length, sequences=study.sequences)
    dense = [accuracy(network, tokenizer, task, None) for task in tasks]
    for seed in run.track(run.seeds, "seeds"):
        pruner = TyrPruner(
            0.5, **dict(study.settings), device=run.device, workdir=run.scratch / f"seed-{seed}", random_state=seed
        )
        plan = pruner.fit(network, ids).plan_
        pruned = [accuracy(network, tokenizer, task, plan) for task in tasks]
        for task, before, after in zip(tasks, dense, pruned):
            run.record("dense", f"accuracy, {task.stem}", before, seed=seed)
            run.record(TYR, f"accuracy, {task.stem}", after, seed=seed)
        kept = float(np.mean(pruned) / np.mean(dense))
        run.record(TYR, f"mean accuracy over eight tasks / the dense model's, {CHECKPOINT}", kept, seed=seed)


def accuracy(network: Network, tokenizer: Any, task: Path, plan: Any, bucket: int = 64) -> float:
    """How often the right answer is the likeliest continuation; sequences of about one length go together."""
    questions = [json.loads(line) for line in task.read_text(encoding="utf-8").splitlines() if line.strip()]
    buckets: dict[int, list[tuple[int, int, list[int], int]]] = {}
    for q, question in enumerate(questions):
        before = tokenizer(question["context"])["input_ids"]
        for c, choice in enumerate(question["choices"]):
            tokens = before + tokenizer(choice, add_special_tokens=False)["input_ids"]
            buckets.setdefault(-(-len(tokens) // bucket) * bucket, []).append((q, c, tokens, len(before)))
    scores = [[-math.inf] * len(question["choices"]) for question in questions]
    for length, sequences in buckets.items():
        # what follows the last token is never looked at by those before it
        ids = torch.tensor([tokens + [0] * (length - len(tokens)) for _, _, tokens, _ in sequences])
        likelihoods = log_likelihoods(network, ids, plan=plan)
        for row, (q, c, tokens, start) in zip(likelihoods, sequences):
            scores[q][c] = float(row[start - 1 : len(tokens) - 1].sum())
    return float(np.mean([np.argmax(s) == question["answer"] for s, question in zip(scores, questions)]))


# The text and the model -----------------------------------------------------------------------------------------------


def text() -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """Characters of the manual's topics, non-ASCII ones as question marks; of every ten chunks one is held out."""
    from pydoc_data.topics import topics

    whole = "".join(topics[key] for key in sorted(topics)).encode("ascii", "replace")
    ids = torch.frombuffer(bytearray(whole), dtype=torch.uint8).long()
    held_out = torch.arange(len(ids)) // CHUNK % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return ids[~held_out], ids[held_out]


def windows(ids: Int[Tensor, " n"], length: int, count: int, rng: np.random.Generator) -> Int[Tensor, "count length"]:
    starts = torch.from_numpy(rng.integers(0, len(ids) - length, count))
    return ids[starts.unsqueeze(1) + torch.arange(length)]


def train(ids: Int[Tensor, " n"], study: Study, seed: int) -> Any:
    """A Llama from its configuration, by AdamW with a warm-up and a cosine."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=study.hidden,
        intermediate_size=study.neurons,
        num_hidden_layers=study.layers,
        num_attention_heads=study.heads,
        max_position_embeddings=study.length,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), study.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_cosine, steps=study.steps))
    rng = np.random.default_rng([seed, 1])
    for _ in range(study.steps):
        batch = windows(ids, study.length + 1, study.batch, rng)
        logits = model(batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def warm_cosine(step: int, *, steps: int, warm: int = 50, last: float = 0.05) -> float:
    if step < warm:
        return (step + 1) / warm
    return last + (1 - last) * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))) / 2
