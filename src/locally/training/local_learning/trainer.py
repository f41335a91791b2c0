"""The training loop: batches, learning rates, one optimizer a block or one for all, checkpoints, exact resumption."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from locally.checks import check_between, check_choice, check_count, check_nonnegative, check_positive
from locally.training.local_learning.isolation import LocalLearner

Schedule = Callable[[int, int, int], float]  # (step, steps an epoch, epochs) -> learning rate


class Status(StrEnum):
    """How a training ended; set by `Trainer`, read from `History.status`."""

    FINISHED = "finished"
    STOPPED = "stopped by the callback"
    DIVERGED = "diverged: a loss is not finite"


@dataclass(frozen=True)
class History:
    """`losses`: each block's mean over each epoch; `accuracies`: on the validation set, NaN where there is none."""

    status: Status
    losses: Float[np.ndarray, "epochs blocks"]
    accuracies: Float[np.ndarray, " epochs"]


def warm_cosine(peak: float, warm_up: float = 0.05) -> Schedule:
    """Linear warm-up over the first share of all steps, then a half cosine to zero.

    >>> schedule = warm_cosine(1.0, warm_up=0.1)
    >>> [round(schedule(step, 10, 2), 3) for step in (0, 1, 11, 19)]
    [0.5, 1.0, 0.5, 0.008]
    """
    check_positive("peak", peak)
    check_between("warm_up", warm_up, 0, 1)

    def rate(step: int, steps: int, epochs: int) -> float:
        total = steps * epochs
        rising = max(round(warm_up * total), 1)
        if step < rising:
            return peak * (step + 1) / rising
        return peak * (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1))) / 2

    return rate


def epoch_cosine(peak: float, warm_up: int = 10, start: float = 0.01) -> Schedule:
    """The authors' schedule: constant within an epoch, cosine over epochs, blended from `start` over the first ones.

    Epoch e = 1 .. E has c_e = peak (1 + cos(pi e / E)) / 2, and up to `warm_up` the rate
    (e - 1) / warm_up c_e + (warm_up + 1 - e) / warm_up start. Source: arXiv 2402.17318, appendix, and its code.
    """
    check_positive("peak", peak)
    check_count("warm_up", warm_up, at_least=0)
    check_nonnegative("start", start)

    def rate(step: int, steps: int, epochs: int) -> float:
        epoch = step // steps + 1
        cosine = peak * (1 + math.cos(math.pi * epoch / epochs)) / 2
        if epoch > warm_up:
            return cosine
        return (epoch - 1) / warm_up * cosine + (warm_up + 1 - epoch) / warm_up * start

    return rate


def nesterov(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The papers' optimizer; the schedule sets the learning rate."""
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains a `LocalLearner` on tensors.

    Args:
        epochs, batch_size: at least 1; an epoch's last samples that fill no batch are left out, in another order each
            epoch, so a batch size above the number of samples is refused.
        schedule: learning rate by step; default `warm_cosine(0.1)`.
        optimizer: makes an optimizer for parameters; default SGD with Nesterov momentum 0.9 and weight decay 1e-4.
        per_block: an optimizer for each block that steps as soon as the block has its gradients, which are then freed;
            else one for all. The result is the same unless the optimizer looks across parameters.
        augment: called with a batch of inputs and a NumPy generator, returns the inputs to train on.
        amp: None, or torch.bfloat16 for mixed precision.
        overlap: as in `LocalLearner.local_step`.
        seed: of the order of batches and of augmentation.

    Raises:
        ValueError, TypeError: a number is out of range, or `amp` needs scaled losses.
    """

    epochs: int
    batch_size: int
    schedule: Schedule = field(default_factory=lambda: warm_cosine(0.1))
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = nesterov
    per_block: bool = False
    augment: Callable[[Tensor, np.random.Generator], Tensor] | None = None
    amp: torch.dtype | None = None
    overlap: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_count("batch_size", self.batch_size)
        check_count("seed", self.seed, at_least=0)
        check_choice("amp", self.amp, (None, torch.bfloat16))

    def fit(
        self,
        learner: LocalLearner,
        x: Shaped[Tensor, "n *input"],
        y: Shaped[Tensor, "n *target"],
        *,
        validation: tuple[Tensor, Tensor] | None = None,
        checkpoint: Path | str | None = None,
        callback: Callable[[int, Float[np.ndarray, " blocks"]], bool | None] | None = None,
    ) -> History:
        """Train in place.

        Args:
            x, y: the training set, on the learner's device.
            validation: inputs and class numbers whose accuracy each epoch ends with.
            checkpoint: a safetensors file, written after each epoch; where it exists, training goes on from it and
                ends as if it had never been interrupted.
            callback: called after each epoch with its number and the blocks' mean losses; True stops.

        Raises:
            ValueError: x and y differ in length or hold less than a batch; the checkpoint is of another network, or
                of training with other numbers.
        """
        if len(x) != len(y):
            raise ValueError(f"x and y must have one entry a sample, got {len(x)} and {len(y)}")
        if self.batch_size > len(x):
            raise ValueError(f"batch_size must be at most the {len(x)} samples of x, got {self.batch_size}")
        blocks = range(learner.plan.n_blocks)
        groups = [learner.block_parameters(k) for k in blocks] if self.per_block else [list(learner.trainable())]
        optimizers = [self.optimizer(group) for group in groups]
        losses, accuracies = np.empty((0, len(blocks))), np.empty(0)
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and path.exists():
            losses, accuracies = self._resume(path, learner, optimizers)
        learner.train()
        for epoch in range(len(losses), self.epochs):
            mean = self._epoch(epoch, learner, optimizers, x, y)
            score = math.nan if validation is None else learner.accuracy(*validation)
            losses, accuracies = np.vstack([losses, mean]), np.append(accuracies, score)
            if not np.isfinite(mean).all():
                return History(Status.DIVERGED, losses, accuracies)
            if path is not None:
                self._save(path, learner, optimizers, losses, accuracies)
            if callback is not None and callback(epoch, mean):
                return History(Status.STOPPED, losses, accuracies)
        return History(Status.FINISHED, losses, accuracies)

    def _epoch(
        self, epoch: int, learner: LocalLearner, optimizers: list[Optimizer], x: Tensor, y: Tensor
    ) -> Float[np.ndarray, " blocks"]:
        rng = np.random.default_rng([self.seed, epoch])
        steps = len(x) // self.batch_size
        order = torch.from_numpy(rng.permutation(len(x))[: steps * self.batch_size]).to(x.device)
        total = torch.zeros(learner.plan.n_blocks, dtype=torch.float64, device=x.device)

        def step_block(k: int) -> None:
            optimizers[k].step()
            optimizers[k].zero_grad()

        for step, batch in enumerate(order.split(self.batch_size)):
            rate = self.schedule(epoch * steps + step, steps, self.epochs)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            inputs = x[batch] if self.augment is None else self.augment(x[batch], rng)
            after = step_block if self.per_block else None
            total += learner.local_step(inputs, y[batch], after_block=after, overlap=self.overlap, amp=self.amp)
            if not self.per_block:
                optimizers[0].step()
                optimizers[0].zero_grad()
        return (total / steps).cpu().numpy()

    def _settings(self, learner: LocalLearner) -> dict[str, Any]:
        return {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "per_block": self.per_block,
            "seed": self.seed,
            "amp": str(self.amp),
            "cuts": list(learner.plan.starts),
        }

    def _save(
        self,
        path: Path,
        learner: LocalLearner,
        optimizers: list[Optimizer],
        losses: Float[np.ndarray, "epochs blocks"],
        accuracies: Float[np.ndarray, " epochs"],
    ) -> None:
        tensors = {f"learner.{name}": t for name, t in _owned_state(learner).items()}
        scalars: dict[str, float] = {}
        for i, optimizer in enumerate(optimizers):
            for number, entries in optimizer.state_dict()["state"].items():
                for name, value in entries.items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizer.{i}.{number}.{name}"] = value
                    elif value is not None:
                        scalars[f"{i}.{number}.{name}"] = value
        tensors["random"] = torch.get_rng_state()
        tensors["losses"], tensors["accuracies"] = torch.from_numpy(losses), torch.from_numpy(accuracies)
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        meta = {"settings": json.dumps(self._settings(learner)), "scalars": json.dumps(scalars)}
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, meta)
        partial.replace(path)

    def _resume(
        self, path: Path, learner: LocalLearner, optimizers: list[Optimizer]
    ) -> tuple[Float[np.ndarray, "epochs blocks"], Float[np.ndarray, " epochs"]]:
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"checkpoint {path} is no safetensors file: {error}") from error
        settings = self._settings(learner)
        found = json.loads(meta.get("settings", "{}"))
        for name, value in settings.items():
            if found.get(name) != value:
                raise ValueError(f"checkpoint {path} was made with {name} = {found.get(name)}, not {value}")
        state = _owned_state(learner)
        saved = {name.removeprefix("learner."): t for name, t in tensors.items() if name.startswith("learner.")}
        misfit = [n for n in state.keys() | saved.keys() if n not in saved or n not in state]
        misfit += [n for n in state.keys() & saved.keys() if state[n].shape != saved[n].shape]
        if misfit:
            raise ValueError(f"checkpoint {path} is of another network: {', '.join(sorted(misfit)[:3])} does not match")
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(saved[name])
        scalars = json.loads(meta["scalars"])
        for i, optimizer in enumerate(optimizers):
            optimizer.load_state_dict(_optimizer_state(optimizer, f"{i}.", tensors, scalars))
        torch.set_rng_state(tensors["random"])
        return tensors["losses"].numpy(), tensors["accuracies"].numpy()


def _owned_state(learner: LocalLearner) -> dict[str, Tensor]:
    """Parameters and buffers, each once: the user's module and its chain are two names of the same tensors."""
    return {**dict(learner.named_parameters()), **dict(learner.named_buffers())}


def _optimizer_state(
    optimizer: Optimizer, prefix: str, tensors: dict[str, Tensor], scalars: dict[str, float]
) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    entries = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    for name, value in {**entries, **scalars}.items():
        if name.startswith(prefix):
            number, _, key = name.removeprefix(prefix).partition(".")
            state.setdefault(int(number), {})[key] = value
    return {**optimizer.state_dict(), "state": state}
