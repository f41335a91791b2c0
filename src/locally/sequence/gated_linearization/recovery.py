"""Recovery of a converted model's quality: low-rank adapters on its query, key and value projections.

Everything else is frozen. The key's adapter trains features, softmax keys and gates at once, since the gates are keys.
Training can be killed at any time and goes on from its last checkpoint to the same numbers. Source: Lan et al.,
arXiv 2503.01496, section 3.3; adapters by peft.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau

from locally.checks import check_choice, check_count, check_nonnegative, check_positive, check_shape
from locally.errors import require

IGNORED = -100  # label of what is no target
TARGETS = ("q_proj", "k_proj", "v_proj")
PLATEAU = ("best", "num_bad_epochs", "last_epoch")


class Status(StrEnum):
    """How training ended; set by `fit_lora`, read from `Recovery.status`."""

    FINISHED = "finished"
    STOPPED = "stopped by the callback"
    DIVERGED = "diverged: the loss is not finite; the adapters are the best ones before"


@dataclass(frozen=True)
class Examples:
    """Sequences of one length to predict the next token of.

    Args:
        tokens: their token numbers.
        labels: as `tokens`, -100 where a token is no target (a prompt, padding); None for `tokens`.
        weights: non-negative weight of each label; None for 1.

    Raises:
        ValueError: shapes differ, fewer than two tokens, nothing to predict.
    """

    tokens: Int64[Tensor, "n T"]
    labels: Int64[Tensor, "n T"] | None = None
    weights: Float[Tensor, "n T"] | None = None

    def __post_init__(self) -> None:
        check_shape("tokens", self.tokens, (None, None))
        if min(self.tokens.shape) < 1 or self.tokens.shape[1] < 2:
            raise ValueError(f"tokens must hold sequences of at least 2 tokens, got shape {tuple(self.tokens.shape)}")
        for name in ("labels", "weights"):
            if getattr(self, name) is not None:
                check_shape(name, getattr(self, name), tuple(self.tokens.shape))
        if self.weights is not None and not bool((self.weights >= 0).all()):
            raise ValueError("weights must be non-negative")
        if not bool((self.targets()[1] > 0).any()):
            raise ValueError("labels leave nothing to predict")

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> "Examples":
        pick = lambda x: None if x is None else x[rows]
        return Examples(self.tokens[rows], pick(self.labels), pick(self.weights))

    def targets(self) -> tuple[Int64[Tensor, "n next"], Float[Tensor, "n next"]]:
        """The next token at each position but the last, and its weight, 0 where it is none."""
        labels = (self.tokens if self.labels is None else self.labels)[:, 1:]
        weights = torch.ones(labels.shape) if self.weights is None else self.weights[:, 1:]
        return labels, weights.to(labels.device) * (labels != IGNORED)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train; defaults are the paper's.

    Args:
        lr: of AdamW, positive; `weight_decay` non-negative.
        epochs: passes over the examples, at least 1; `batch_size` examples at a time, `accumulation` batches a step.
        decay: "plateau" multiplies the rate by `factor` after `patience` validations without progress, "cosine" lets it
            fall to 0 after `warmup` steps, "constant" does neither.
        min_lr: of "plateau".
        evaluate_every: steps between validations; the adapters with the lowest validation loss are kept.
        max_grad_norm: clips gradients; None for no clipping.
        seed: of adapters and order.

    Raises:
        ValueError, TypeError: an argument out of range.
    """

    lr: float = 1e-3
    epochs: int = 2
    batch_size: int = 1
    accumulation: int = 8
    weight_decay: float = 0.01
    decay: str = "plateau"
    warmup: int = 0
    factor: float = 0.1
    patience: int = 10
    min_lr: float = 1e-5
    evaluate_every: int = 200
    max_grad_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("lr", self.lr)
        for name in ("epochs", "batch_size", "accumulation", "evaluate_every"):
            check_count(name, getattr(self, name))
        for name in ("warmup", "patience"):
            check_count(name, getattr(self, name), at_least=0)
        check_nonnegative("weight_decay", self.weight_decay)
        check_choice("decay", self.decay, ("plateau", "cosine", "constant"))
        check_positive("factor", self.factor, below=1)
        check_nonnegative("min_lr", self.min_lr)
        if self.max_grad_norm is not None:
            check_positive("max_grad_norm", self.max_grad_norm)

    def steps(self, examples: int) -> int:
        """Steps of the optimizer in all, for that many examples."""
        return self.epochs * self.steps_of_an_epoch(examples)

    def steps_of_an_epoch(self, examples: int) -> int:
        """Whole steps that an epoch of that many examples makes, at least 1; what is left over is dropped."""
        return max(1, examples // (self.batch_size * self.accumulation))

    def rows(self, step: int, examples: int) -> Int64[Tensor, " rows"]:
        """Which examples a step reads: a function of step and seed alone, so that a resumed run reads the same."""
        epoch, within = divmod(step, self.steps_of_an_epoch(examples))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        size = self.batch_size * self.accumulation
        return torch.randperm(examples, generator=generator)[within * size : (within + 1) * size]


@dataclass(frozen=True)
class Recovery:
    """What training gave. `model` carries the best adapters; `merged()` gives the model without them, equal to it."""

    model: nn.Module
    status: Status
    losses: tuple[float, ...]  # of each step, weighted mean over its targets
    validation: tuple[tuple[int, float], ...]  # steps done, loss
    best_step: int  # steps after which the kept adapters were taken
    resumed_from: int  # 0 for a run from the start
    trainable: int
    parameters: int

    def merged(self) -> Any:
        """Adapters added into the projections: the architecture of the conversion, and no adapters."""
        return self.model.merge_and_unload()  # type: ignore[operator]


@dataclass
class Progress:
    """What a checkpoint holds beside tensors."""

    step: int = 0
    lr: float = 0.0
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: float = math.inf
    best_step: int = 0
    plateau: dict[str, float] = field(default_factory=dict)


def fit_lora(
    model: nn.Module,
    train: Examples,
    validation: Examples | None = None,
    schedule: Schedule | None = None,
    *,
    rank: int = 8,
    alpha: float = 8.0,
    targets: Sequence[str] = TARGETS,
    checkpoint: str | Path | None = None,
    save_every: int = 50,
    callback: Callable[[int, int, float], bool | None] | None = None,
) -> Recovery:
    """Train adapters of the projections by next-token cross-entropy, all else frozen.

    Args:
        model: a converted model (or any causal model of Transformers with these projections); its adapters are put in
            place.
        validation: without it the last adapters are kept, and "plateau" judges the training loss.
        rank, alpha: adapters are alpha / rank B A, A random (Kaiming), B zero.
        targets: which projections get one.
        checkpoint: a file that is renewed every `save_every` steps, and from which training goes on if it is there.
            Resumed runs give the numbers of a run in one go.
        callback: called with (steps done, steps in all, loss); False stops after saving.

    Raises:
        ValueError: an argument out of range, a token that the model does not know, or a checkpoint of another model,
            other examples or settings.
        MissingExtra: peft is not installed.

    Complexity:
        Forward and backward of the model for every example and epoch; memory for the gradients and moments of
        sum over projections of rank (inputs + outputs) numbers.
    """
    schedule = Schedule() if schedule is None else schedule
    check_count("rank", rank)
    check_positive("alpha", alpha)
    check_count("save_every", save_every)
    check_vocabulary(model, train, validation)
    peft = require("peft", "llm")
    identity = fingerprint(model, train, validation, schedule, rank, alpha, tuple(targets))
    path = None if checkpoint is None else Path(checkpoint)
    lora = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)
        adapted = peft.get_peft_model(model, lora)
    adapters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapters.values(), schedule.lr, weight_decay=schedule.weight_decay)
    plateau = ReduceLROnPlateau(optimizer, "min", schedule.factor, schedule.patience, min_lr=schedule.min_lr)
    progress = Progress(lr=schedule.lr)
    best = {name: p.detach().clone() for name, p in adapters.items()}
    if path is not None and path.exists():
        progress = restore(path, identity, adapters, best, optimizer)
        plateau.load_state_dict(progress.plateau)
    resumed_from, total = progress.step, schedule.steps(len(train))
    status = Status.FINISHED
    adapted.train()
    while progress.step < total:
        rate = learning_rate(schedule, progress, total)
        loss = descend(adapted, optimizer, train[schedule.rows(progress.step, len(train))], schedule, rate)
        if not math.isfinite(loss):
            status = Status.DIVERGED
            break
        progress.losses.append(loss)
        progress.step += 1
        if progress.step % schedule.evaluate_every == 0 or progress.step == total:
            evaluate(adapted, validation, schedule, progress, plateau, adapters, best)
        keep_on = callback is None or callback(progress.step, total, loss) is not False
        if path is not None and (progress.step % save_every == 0 or progress.step == total or not keep_on):
            save(path, identity, progress, adapters, best, optimizer)
        if not keep_on:
            status = Status.STOPPED
            break
    with torch.no_grad():
        for name, p in adapters.items():
            if validation is not None or status is Status.DIVERGED:
                p.copy_(best[name])
    count = sum(p.numel() for p in adapters.values())
    everything = sum(p.numel() for p in adapted.parameters()) - count
    return Recovery(
        adapted.eval(),
        status,
        tuple(progress.losses),
        tuple(progress.validation),
        progress.best_step if validation is not None else progress.step,
        resumed_from,
        count,
        everything,
    )


def descend(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Examples, schedule: Schedule, rate: float
) -> float:
    """One step of AdamW on the weighted mean over all targets of the step, a batch at a time."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    whole = batch.targets()[1].sum().clamp(min=1e-12)
    loss = 0.0
    for start in range(0, len(batch), schedule.batch_size):
        part = (
            sum_of_losses(
                model,
                batch.tokens[start : start + schedule.batch_size],
                *(x[start : start + schedule.batch_size] for x in batch.targets()),
            )
            / whole
        )
        part.backward()
        loss += part.item()
    if schedule.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], schedule.max_grad_norm)
    if math.isfinite(loss):
        optimizer.step()
    return loss


def sum_of_losses(model: nn.Module, tokens: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    device = next(model.parameters()).device
    logits = model(input_ids=tokens.to(device), use_cache=False).logits[:, :-1].float()
    losses = cross_entropy(logits.transpose(1, 2), labels.to(device), ignore_index=IGNORED, reduction="none")
    return (losses * weights.to(device)).sum()


@torch.no_grad()
def mean_loss(model: nn.Module, examples: Examples, batch_size: int = 16) -> float:
    """Weighted mean cross-entropy over all targets, in nats; its exponential is the perplexity."""
    was_training = model.training
    model.eval()
    total, weight = 0.0, 0.0
    labels, weights = examples.targets()
    for start in range(0, len(examples), batch_size):
        part = slice(start, start + batch_size)
        total += float(sum_of_losses(model, examples.tokens[part], labels[part], weights[part]))
        weight += float(weights[part].sum())
    model.train(was_training)
    return total / weight


def evaluate(
    model: nn.Module,
    validation: Examples | None,
    schedule: Schedule,
    progress: Progress,
    plateau: ReduceLROnPlateau,
    adapters: dict[str, nn.Parameter],
    best: dict[str, Tensor],
) -> None:
    since = progress.validation[-1][0] if progress.validation else 0
    if validation is None:
        loss = sum(progress.losses[since:]) / (progress.step - since)
    else:
        loss = mean_loss(model, validation, schedule.batch_size)
    progress.validation.append((progress.step, loss))
    if loss < progress.best:
        progress.best, progress.best_step = loss, progress.step
        for name, p in adapters.items():
            best[name].copy_(p.detach())
    if schedule.decay == "plateau":
        plateau.step(loss)
        progress.lr = plateau.optimizer.param_groups[0]["lr"]
    progress.plateau = {name: getattr(plateau, name) for name in PLATEAU}


def learning_rate(schedule: Schedule, progress: Progress, total: int) -> float:
    if schedule.decay != "cosine":
        return progress.lr
    step = progress.step
    if step < schedule.warmup:
        return schedule.lr * (step + 1) / schedule.warmup
    return schedule.lr * (1 + math.cos(math.pi * (step - schedule.warmup) / max(total - schedule.warmup, 1))) / 2


# Checkpoints ----------------------------------------------------------------------------------------------------------


def save(
    path: Path,
    identity: dict[str, Any],
    progress: Progress,
    adapters: dict[str, nn.Parameter],
    best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """One file, written beside and renamed: a kill leaves the old one or the new one, never half of one."""
    tensors = {}
    for name, p in adapters.items():
        moments = optimizer.state[p]
        tensors[f"now/{name}"], tensors[f"best/{name}"] = p.detach(), best[name]
        tensors[f"first/{name}"], tensors[f"second/{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
    held = {"progress": json.dumps(asdict(progress)), "identity": json.dumps(identity)}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: x.contiguous() for name, x in tensors.items()}, beside, held)
        with open(beside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def restore(
    path: Path,
    identity: dict[str, Any],
    adapters: dict[str, nn.Parameter],
    best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> Progress:
    try:
        with safe_open(path, framework="pt") as file:
            held = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        before = json.loads(held["identity"])
        counts = json.loads(held["progress"])
        counts["validation"] = [(int(step), float(loss)) for step, loss in counts["validation"]]
        progress = Progress(**counts)
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from None
    differs = [name for name in identity if before.get(name) != json.loads(json.dumps(identity[name]))]
    if differs:
        raise ValueError(f"checkpoint {path} belongs to another run: {', '.join(differs)} differ; remove it to restart")
    with torch.no_grad():
        for name, p in adapters.items():
            p.copy_(tensors[f"now/{name}"])
            best[name].copy_(tensors[f"best/{name}"])
            optimizer.state[p] = {
                "step": torch.tensor(float(progress.step)),
                "exp_avg": tensors[f"first/{name}"].to(p.device),
                "exp_avg_sq": tensors[f"second/{name}"].to(p.device),
            }
    return progress


def fingerprint(
    model: nn.Module,
    train: Examples,
    validation: Examples | None,
    schedule: Schedule,
    rank: int,
    alpha: float,
    targets: tuple[str, ...],
) -> dict[str, Any]:
    """What a resumed run must have in common with the one that it continues; of the weights, the start of each."""
    weights = 0
    for name, p in model.named_parameters():
        start = p.detach().flatten()[:256].float().cpu().numpy()
        weights = zlib.crc32(start.tobytes(), zlib.crc32(f"{name} {tuple(p.shape)}".encode(), weights))
    digest = lambda x: (
        None if x is None else [zlib.crc32(t.contiguous().numpy().tobytes()) for t in (x.tokens, *x.targets())]
    )
    return {
        "model": weights,
        "conversion": getattr(model.config, "liger", None),
        "examples": digest(train),
        "validation": digest(validation),
        "schedule": asdict(schedule),
        "rank": rank,
        "alpha": alpha,
        "targets": list(targets),
    }


def check_vocabulary(model: nn.Module, *examples: Examples | None) -> None:
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    for some in examples:
        if some is not None and not 0 <= int(some.tokens.min()) <= int(some.tokens.max()) < rows:
            raise ValueError(
                f"tokens must lie in [0, {rows}), which the model knows, got"
                f" {int(some.tokens.min())} .. {int(some.tokens.max())}: does the tokenizer belong to this model?"
            )
