"""Objectives of the two stages, and the loop that trains a network on batches of views.

Source: arXiv 2301.01805: total coding rate as the self-supervised start, then Algorithm 1.
"""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locally.checks import check_choice, check_count, check_nonnegative, check_positive
from locally.subspaces.manifold_clustering.augmentation import Augmentation
from locally.subspaces.manifold_clustering.coding_rate import coding_rate, coding_rate_membership
from locally.subspaces.manifold_clustering.optimizers import LARS, Adam, Group, Momentum, Optimizer
from locally.subspaces.manifold_clustering.sinkhorn import sinkhorn_projection
from locally.subspaces.manifold_clustering.spectral import cosines

Views = Float[Tensor, "views n d"]
Callback = Callable[[str, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TotalCodingRate:
    """Self-supervised start: spread all samples, keep the views of one together.

    Args:
        eps_sq: squared distortion, positive.
        lam: weight of the agreement between views, non-negative.
        form: "views" takes the mean of the views' rates, with the factor 1/2 of the public code, and signed cosines;
            "mean" is the paper's formula, the rate of the averaged views and absolute cosines. Agreement is averaged
            over samples in both, so that `lam` does not depend on the batch.
    """

    eps_sq: float = 0.2
    lam: float = 30.0
    form: str = "views"
    name: str = field(default="tcr", init=False)

    def __post_init__(self) -> None:
        check_positive("eps_sq", self.eps_sq)
        check_nonnegative("lam", self.lam)
        check_choice("form", self.form, ("views", "mean"))

    def __call__(self, z: Views, c: Views) -> tuple[Tensor, dict[str, Tensor]]:
        views = len(z)
        cosine = torch.einsum("and,bnd->abn", z, z)
        pairs = torch.triu_indices(views, views, 1, device=z.device)
        cosine = cosine[pairs[0], pairs[1]]
        if self.form == "mean":
            rate, cosine = coding_rate(z.mean(0), self.eps_sq), cosine.abs()
        else:
            rate = coding_rate(z, self.eps_sq).mean() / 2
        agreement = cosine.mean() if views > 1 else z.new_zeros(())
        return -rate - self.lam * agreement, {"rate": rate.detach(), "agreement": agreement.detach()}


@dataclass(frozen=True)
class RateReduction:
    """-(R(Z) - R_c(Z, G)), Z the re-normalised mean of the views, G the mean of their doubly stochastic memberships.

    Args:
        eps_sq: squared distortion, positive.
        eta: weight of the entropy in the projection, positive.
        half_steps: of Sinkhorn; an even number makes column sums exact, which R_c divides by.
        affinity: "inner" or "abs".
        detach_v: as in `sinkhorn_projection`.
        penalty: weight of |G|_F^2 / 2, non-negative.
    """

    eps_sq: float = 0.2
    eta: float = 0.175
    half_steps: int = 10
    affinity: str = "inner"
    detach_v: bool = False
    penalty: float = 0.0
    name: str = field(default="mlc", init=False)

    def __post_init__(self) -> None:
        check_positive("eps_sq", self.eps_sq)
        check_positive("eta", self.eta)
        check_count("half_steps", self.half_steps)
        check_choice("affinity", self.affinity, ("inner", "abs"))
        check_nonnegative("penalty", self.penalty)

    def __call__(self, z: Views, c: Views) -> tuple[Tensor, dict[str, Tensor]]:
        Z = nn.functional.normalize(z.mean(0), dim=1)
        G = self.membership(c)
        whole, parts = coding_rate(Z, self.eps_sq), coding_rate_membership(Z, G, self.eps_sq)
        loss = parts - whole
        if self.penalty:
            loss = loss + self.penalty / 2 * G.square().sum()
        return loss, {"rate": whole.detach(), "rate of clusters": parts.detach()}

    def membership(self, c: Views) -> Float[Tensor, "n n"]:
        """A mean of doubly stochastic matrices is one too."""
        S = cosines(c, self.affinity)
        return sinkhorn_projection(S, self.eta, self.half_steps, detach_v=self.detach_v, spread=2.0).mean(0)


Objective = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Schedule:
    """How one stage steps.

    Args:
        steps: batches, at least 0.
        lr: learning rate after warm-up, positive.
        optimizer: "adam", "sgd" (momentum 0.9) or "lars" (layer-wise rates over momentum 0.9).
        weight_decay: of all but the cluster head, non-negative.
        cluster_weight_decay: of the cluster head; as the others by default.
        warmup: steps of linear increase.
        cosine: whether the rate then falls to zero along a cosine.
    """

    steps: int
    lr: float
    optimizer: str = "adam"
    weight_decay: float = 1e-4
    cluster_weight_decay: float | None = None
    warmup: int = 0
    cosine: bool = False

    def __post_init__(self) -> None:
        check_count("steps", self.steps, at_least=0)
        check_positive("lr", self.lr)
        check_choice("optimizer", self.optimizer, ("adam", "sgd", "lars"))
        check_nonnegative("weight_decay", self.weight_decay)
        check_count("warmup", self.warmup, at_least=0)

    def factor(self, step: int) -> float:
        """Of the learning rate, at a step that counts from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if not self.cosine:
            return 1.0
        return (1 + math.cos(math.pi * (step - self.warmup) / max(self.steps - self.warmup, 1))) / 2

    def optimizer_for(self, net: nn.Module) -> Optimizer:
        """The optimizer of this stage, with the cluster head as a group of its own."""
        head = [p for name, p in net.named_parameters() if name.startswith("cluster_head.")]
        rest = [p for name, p in net.named_parameters() if not name.startswith("cluster_head.")]
        decay = self.weight_decay if self.cluster_weight_decay is None else self.cluster_weight_decay
        groups = [Group(rest, self.weight_decay), Group(head, decay)]
        rules: dict[str, type[Optimizer]] = {"adam": Adam, "sgd": Momentum, "lars": LARS}
        return rules[self.optimizer](groups)


class Batches:
    """Batches without replacement, reshuffled when the rest of a pass is shorter than a batch."""

    def __init__(self, n: int, size: int, generator: torch.Generator):
        self.n, self.size, self.generator = n, min(size, n), generator
        self.order, self.at = torch.randperm(n, generator=generator), 0

    def next(self) -> Tensor:
        if self.at + self.size > self.n:
            self.order, self.at = torch.randperm(self.n, generator=self.generator), 0
        self.at += self.size
        return self.order[self.at - self.size : self.at]


def generators(seed: int, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
    """One on the CPU for order and weights, one on the device for views."""
    return torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed + 1)


@dataclass
class Training:
    """One stage on one network, step by step; can be saved and taken up where it stopped.

    Args:
        net: maps a batch to (z, c); on the device where the stage runs.
        X: all samples, a flat row each; batches move to the device of the network.
        objective: maps views of both to a loss and what to log.
        schedule: steps and optimiser.
        batch_size: samples a step; the whole set where it is smaller.
        n_views: augmented views a sample, at least 1.
        augment: makes a view; None takes the samples as they are.
        seed: of order and views.
        amp: run the network under bfloat16 autocast; rates and projection stay in float32.
    """

    net: nn.Module
    X: Float[Tensor, "n features"]
    objective: Objective
    schedule: Schedule
    batch_size: int
    n_views: int = 2
    augment: Augmentation | None = None
    seed: int = 0
    amp: bool = False

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        check_count("n_views", self.n_views)
        self.device = next(self.net.parameters()).device
        self.order_generator, self.view_generator = generators(self.seed, self.device)
        self.batches = Batches(len(self.X), self.batch_size, self.order_generator)
        self.optimizer = self.schedule.optimizer_for(self.net)
        self.step = 0
        self.log: dict[str, list[Tensor]] = {}

    def run(
        self, callback: Callback | None = None, checkpoint: Path | None = None, every: int = 1000
    ) -> dict[str, list[float]]:
        """Take the remaining steps; returns what the objective logged at each.

        Args:
            callback: sees every step, `callback(stage, step, logged)`; on a GPU each call waits for the step.
            checkpoint: a file to take up from where it exists, written every `every` steps and on interruption.

        Raises:
            FloatingPointError: a rate could not be computed any more, or is not finite at the end.
        """
        if checkpoint is not None and checkpoint.exists():
            self.load(checkpoint)
        stage = getattr(self.objective, "name", "")
        self.net.train()
        try:
            while self.step < self.schedule.steps:
                logged = self._take_step()
                if callback is not None:
                    callback(stage, self.step, {name: float(value) for name, value in logged.items()})
                if checkpoint is not None and self.step % every == 0:
                    self.save(checkpoint)
        except torch.linalg.LinAlgError as error:  # the factorisation of a rate met NaN or infinity
            raise FloatingPointError(self._diverged(stage)) from error
        except KeyboardInterrupt:
            if checkpoint is not None:
                self.save(checkpoint)
            raise
        history = {name: torch.stack(values).tolist() for name, values in self.log.items()}
        if not all(math.isfinite(v[-1]) for v in history.values()):
            raise FloatingPointError(self._diverged(stage))
        return history

    def _diverged(self, stage: str) -> str:
        return f"stage {stage!r} diverged at step {self.step}: try a smaller learning rate than {self.schedule.lr}"

    def _take_step(self) -> dict[str, Tensor]:
        x = self.X[self.batches.next()].to(self.device)
        augment = self.augment or (lambda x, generator: x)
        # all views in one pass, so that batch normalisation sees them together
        views = torch.cat([augment(x, self.view_generator) for _ in range(self.n_views)])
        with torch.autocast(self.device.type, torch.bfloat16) if self.amp else nullcontext():
            z, c = self.net(views)
        loss, logged = self.objective(z.unflatten(0, (self.n_views, -1)), c.unflatten(0, (self.n_views, -1)))
        self.optimizer.zero_grad()
        loss.backward()
        if (lr := self.schedule.lr * self.schedule.factor(self.step)) > 0:
            self.optimizer.step(lr)
        self.step += 1
        for name, value in logged.items():
            self.log.setdefault(name, []).append(value)
        return logged

    def save(self, path: Path) -> None:
        """Weights, optimiser, order, generators and log, in one safetensors file that replaces the old one at once."""
        from safetensors.torch import save_file

        tensors = {f"net/{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {f"optimizer/{name}": value for name, value in self.optimizer.state().items()}
        tensors |= {f"log/{name}": torch.stack(values) for name, values in self.log.items()}
        tensors |= {"order": self.batches.order, "generators/order": self.order_generator.get_state()}
        tensors |= {"generators/views": self.view_generator.get_state()}
        tensors |= {"at": torch.tensor([self.step, self.batches.at])}
        part = path.with_name(path.name + ".part")
        save_file({name: value.detach().contiguous().cpu() for name, value in tensors.items()}, part)
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """What `save` wrote.

        Raises:
            ValueError: the file belongs to a stage of another shape.
        """
        from safetensors.torch import load_file

        tensors = load_file(path)
        own = self.net.state_dict()
        weights = {name: tensors.get(f"net/{name}") for name in own}
        order = tensors.get("order")
        if (
            order is None
            or len(order) != len(self.X)
            or any(w is None or w.shape != own[n].shape for n, w in weights.items())
        ):
            raise ValueError(f"checkpoint {path} was not written by this stage with this data and network")
        self.net.load_state_dict(weights)
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        self.optimizer.load_state(part("optimizer/"))
        self.log = {name: list(values.to(self.device)) for name, values in part("log/").items()}
        self.batches.order = order
        self.order_generator.set_state(tensors["generators/order"])
        self.view_generator.set_state(tensors["generators/views"])
        self.step, self.batches.at = tensors["at"].tolist()
