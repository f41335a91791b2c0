"""Deep models of a stream to compare with: one gradient step a sample, with and without a memory of the past.

Independent streams are trained side by side in one batch of small networks, each with its own data and learning rate,
so that a search over learning rates costs little more than one run. Fuzzy tiling is Pan et al. (2021), synaptic
intelligence Zenke et al. (2017).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from locally.checks import check_choice, check_count, check_finite, check_nonnegative, check_positive, check_shape
from locally.control.world_model.encoding import read_inputs, take_over

BETA1, BETA2, TINY = 0.9, 0.999, 1e-8  # Adam's
REMNANT, REMNANT_STEPS = 1e-30, 100  # smaller means of gradients are dropped, looked for every so many steps


class StreamNetworks:
    """Multilayer perceptrons, one for each stream, trained by Adam on the squared loss as samples come.

    Args:
        n_inputs, n_targets: widths of x and y.
        n_streams: E, networks side by side.
        hidden: widths of the hidden layers.
        activation: "relu", or "fta": the last hidden layer is passed through tanh and fuzzy tiles of width 0.1.
        lr: Adam's learning rate, one or one for each stream.
        memory: "none" takes a step on the newest sample alone; "replay" on samples drawn from the whole past;
            "coreset" on the newest and some from a uniform sample of the past, `memory_size` large.
        memory_size: of the coreset.
        batch_size: samples a step, with a memory.
        steps_per_sample: gradient steps after each sample.
        si_strength: c of synaptic intelligence, 0 to leave it out.
        si_period: samples between two consolidations.
        generator: of weights and draws.

    Raises:
        ValueError, TypeError: an argument is out of range.

    Complexity: that of `steps_per_sample` gradient steps; "replay" keeps every sample.
    """

    def __init__(
        self,
        n_inputs: int,
        n_targets: int,
        *,
        n_streams: int = 1,
        hidden: Sequence[int] = (50, 50),
        activation: str = "relu",
        lr: float | Sequence[float] = 1e-3,
        memory: str = "none",
        memory_size: int = 1000,
        batch_size: int = 32,
        steps_per_sample: int = 1,
        si_strength: float | int = 0.0,
        si_period: int = 1000,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, count in (("n_inputs", n_inputs), ("n_targets", n_targets), ("n_streams", n_streams)):
            check_count(name, count)
        for width in hidden:
            check_count("hidden", width)
        check_choice("activation", activation, ("relu", "fta"))
        check_choice("memory", memory, ("none", "replay", "coreset"))
        for name, count in (("memory_size", memory_size), ("batch_size", batch_size), ("si_period", si_period)):
            check_count(name, count)
        check_count("steps_per_sample", steps_per_sample)
        check_nonnegative("si_strength", si_strength)
        rates = torch.as_tensor(lr, dtype=torch.float32).reshape(-1, 1)
        if len(rates) not in (1, n_streams):
            raise ValueError(f"lr must be one number or {n_streams}, got {len(rates)}")
        for rate in rates.flatten().tolist():
            check_positive("lr", rate)

        self.generator = generator or torch.Generator().manual_seed(torch.seed())
        self.n_streams, self.activation, self.memory = n_streams, activation, memory
        self.memory_size, self.batch_size, self.steps_per_sample = memory_size, batch_size, steps_per_sample
        self.si_strength, self.si_period = float(si_strength), si_period
        self.rates = rates.expand(n_streams, 1)
        last_width = hidden[-1] * len(TILES) if activation == "fta" else hidden[-1]
        self.shapes = [*zip((n_inputs, *hidden[:-1]), hidden), (last_width, n_targets)]
        self.theta = torch.cat([w for a, b in self.shapes for w in self._draw_layer(a, b)], dim=1)
        self.moments = torch.zeros(2, *self.theta.shape)
        self.n_steps = 0
        self.anchor, self.path = self.theta.clone(), torch.zeros_like(self.theta)
        self.importance = torch.zeros_like(self.theta)
        self.n_seen = 0
        self.kept_x = torch.zeros(n_streams, 0, n_inputs)
        self.kept_y = torch.zeros(n_streams, 0, n_targets)

    def _draw_layer(self, fan_in: int, fan_out: int) -> list[Tensor]:
        """Weights and biases uniform in +-1 / sqrt(fan_in), PyTorch's default for linear layers."""
        bound = 1 / math.sqrt(fan_in)
        shape = (self.n_streams, (fan_in + 1) * fan_out)
        return [(2 * torch.rand(shape, generator=self.generator) - 1) * bound]

    def _layers(self, flat: Float[Tensor, "E P"]) -> list[tuple[Tensor, Tensor]]:
        """Weights (E, a, b) and biases (E, 1, b) of each layer, as views."""
        layers = []
        for (a, b), part in zip(self.shapes, flat.split([(a + 1) * b for a, b in self.shapes], dim=1)):
            layers.append((part[:, : a * b].unflatten(1, (a, b)), part[:, None, a * b :]))
        return layers

    def _forward(self, x: Float[Tensor, "E n d_in"]) -> tuple[list[Tensor], Float[Tensor, "E n d_out"]]:
        """What each layer is fed with, and the output."""
        fed = [x]
        for layer, (W, bias) in enumerate(self._layers(self.theta)):
            x = torch.baddbmm(bias, fed[-1], W)
            if layer < len(self.shapes) - 2 or (layer < len(self.shapes) - 1 and self.activation == "relu"):
                fed.append(x.relu_())
            elif layer < len(self.shapes) - 1:
                fed.append(fuzzy_tiles(x.tanh()))
                self._tiled = x
        return fed, x

    def _gradient(self, x: Float[Tensor, "E n d_in"], y: Float[Tensor, "E n d_out"]) -> Float[Tensor, "E P"]:
        """Of the mean squared error of each stream, by hand: autograd costs more than these small products."""
        fed, out = self._forward(x)
        gradient = torch.empty_like(self.theta)
        back = (out - y) * (2 / (y.shape[1] * y.shape[2]))
        layers, slots = self._layers(self.theta), self._layers(gradient)
        for layer in reversed(range(len(layers))):
            slots[layer][0].copy_(fed[layer].mT @ back)
            slots[layer][1].copy_(back.sum(dim=1, keepdim=True))
            if layer == 0:
                break
            back = back @ layers[layer][0].mT
            if layer == len(layers) - 1 and self.activation == "fta":
                squashed = self._tiled.tanh()
                back = (back.unflatten(-1, (-1, len(TILES))) * fuzzy_slopes(squashed)).sum(-1) * (1 - squashed**2)
            else:
                back.mul_(fed[layer] > 0)
        return gradient

    def update(self, x: Float[Tensor, "E d_in"], y: Float[Tensor, "E d_out"]) -> None:
        """Take in one sample of every stream and make `steps_per_sample` gradient steps."""
        check_finite("x", x)
        check_finite("y", y)
        x, y = x.float(), y.float()
        if self.memory != "none":
            self._keep(x, y)
        self.n_seen += 1
        for _ in range(self.steps_per_sample):
            self._step(*self._batch(x, y))
        if self.si_strength and self.n_seen % self.si_period == 0:
            self._consolidate()

    def _keep(self, x: Tensor, y: Tensor) -> None:
        room = self.kept_x.shape[1]
        if self.memory == "coreset" and self.n_seen >= self.memory_size:
            place = torch.randint(self.n_seen + 1, (self.n_streams,), generator=self.generator)
            chosen = (place < self.memory_size).nonzero().flatten()
            self.kept_x[chosen, place[chosen]] = x[chosen]
            self.kept_y[chosen, place[chosen]] = y[chosen]
            return
        if self.n_seen == room:
            more = max(256, room)
            self.kept_x = torch.cat([self.kept_x, self.kept_x.new_zeros(len(x), more, x.shape[1])], dim=1)
            self.kept_y = torch.cat([self.kept_y, self.kept_y.new_zeros(len(y), more, y.shape[1])], dim=1)
        self.kept_x[:, self.n_seen] = x
        self.kept_y[:, self.n_seen] = y

    def _batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.memory == "none":
            return x[:, None], y[:, None]
        kept = self.n_seen if self.memory == "replay" else min(self.n_seen, self.memory_size)
        rows = torch.randint(kept, (self.n_streams, self.batch_size), generator=self.generator)
        streams = torch.arange(self.n_streams)[:, None]
        xs, ys = self.kept_x[streams, rows], self.kept_y[streams, rows]
        if self.memory == "coreset":
            xs[:, 0], ys[:, 0] = x, y
        return xs, ys

    def _step(self, x: Tensor, y: Tensor) -> None:
        g = self._gradient(x, y)
        total = g
        if self.si_strength:
            total = g + 2 * self.si_strength * self.importance * (self.theta - self.anchor)
        self.n_steps += 1
        mean, square = self.moments
        if self.n_steps % REMNANT_STEPS == 0:
            # of units that fell silent: nothing beside TINY, but processors are many times slower at such numbers
            mean.masked_fill_(mean.abs() < REMNANT, 0.0)
        mean.lerp_(total, 1 - BETA1)
        square.mul_(BETA2).addcmul_(total, total, value=1 - BETA2)
        root = square.sqrt().div_(math.sqrt(1 - BETA2**self.n_steps)).add_(TINY)
        move = torch.div(mean, root, out=root).mul_(self.rates * (-1 / (1 - BETA1**self.n_steps)))
        self.theta += move
        if self.si_strength:
            self.path -= g * move

    def _consolidate(self) -> None:
        """Weights along whose path the loss fell become dear to move (Zenke et al., equations 4 and 5)."""
        self.importance += self.path.clamp(min=0) / ((self.theta - self.anchor).square() + 1e-3)
        self.anchor, self.path = self.theta.clone(), torch.zeros_like(self.theta)

    def predict(self, x: Float[Tensor, "E n d_in"]) -> Float[Tensor, "E n d_out"]:
        """Outputs of every stream's network for its own rows."""
        return self._forward(x.float())[1]

    def state_dict(self) -> dict[str, Any]:
        """Weights, Adam's moments, what synaptic intelligence and the memory keep, and the generator."""
        names = ("theta", "moments", "anchor", "path", "importance", "kept_x", "kept_y")
        state: dict[str, Any] = {name: getattr(self, name).clone() for name in names}
        return state | {"n_steps": self.n_steps, "n_seen": self.n_seen, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if the networks have other shapes."""
        for name in ("theta", "moments", "anchor", "path", "importance"):
            check_shape(name, state[name], tuple(getattr(self, name).shape))
        for name in ("kept_x", "kept_y"):
            check_shape(name, state[name], (self.n_streams, len(state["kept_x"][0]), getattr(self, name).shape[2]))
        for name in ("theta", "moments", "anchor", "path", "importance", "kept_x", "kept_y"):
            setattr(self, name, state[name].clone())
        self.n_steps, self.n_seen = int(state["n_steps"]), int(state["n_seen"])
        self.generator.set_state(state["generator"])


TILE = 0.1
TILES = -1 + TILE * torch.arange(20)  # lower borders of tiles that cover [-1, 1]


def fuzzy_tiles(z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch tiles"]:
    """Each number in [-1, 1] as 20 memberships of tiles 0.1 wide, which fade out over 0.1 on either side.

    >>> fuzzy_tiles(torch.tensor([[0.05]]))[0, 9:13]
    tensor([0.9500, 1.0000, 0.9500, 0.0000])
    """
    away = (TILES - z[..., None]).relu() + (z[..., None] - TILE - TILES).relu()
    return (1 - torch.where(away > TILE, torch.ones_like(away), away)).flatten(-2)


def fuzzy_slopes(z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n 20"]:
    """Derivatives of `fuzzy_tiles`: a membership changes only where it fades."""
    below, above = TILES - z[..., None], z[..., None] - TILE - TILES
    return ((below > 0) & (below <= TILE)).float() - ((above > 0) & (above <= TILE)).float()


class NetworkRegressor(RegressorMixin, BaseEstimator):
    """One `StreamNetworks` network as a scikit-learn regressor that learns by `partial_fit`, row after row.

    Args: as for `StreamNetworks`; `random_state` is an integer seed, or None.

    >>> model = NetworkRegressor(hidden=(8,), random_state=0).partial_fit(np.ones((3, 2)), np.ones(3))
    >>> model.predict(np.ones((1, 2))).shape
    (1,)
    """

    def __init__(
        self,
        hidden: Sequence[int] = (64, 64),
        *,
        activation: str = "relu",
        lr: float = 1e-3,
        memory: str = "none",
        memory_size: int = 1000,
        batch_size: int = 32,
        steps_per_sample: int = 1,
        si_strength: float | int = 0.0,
        si_period: int = 1000,
        random_state: int | None = None,
    ) -> None:
        self.hidden = hidden
        self.activation = activation
        self.lr = lr
        self.memory = memory
        self.memory_size = memory_size
        self.batch_size = batch_size
        self.steps_per_sample = steps_per_sample
        self.si_strength = si_strength
        self.si_period = si_period
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        tags.non_deterministic = True
        return tags

    def fit(self, X: Any, y: Any) -> "NetworkRegressor":
        """Forget everything and go over X (n, n_inputs) and y (n,) or (n, n_targets) once, in order."""
        if hasattr(self, "networks_"):
            del self.networks_
        return self.partial_fit(X, y)

    def partial_fit(self, X: Any, y: Any) -> "NetworkRegressor":
        """Go on with the rows of X (n, n_inputs) and y (n,) or (n, n_targets), in order."""
        first = not hasattr(self, "networks_")
        if first or type(y) is not ndarray or y.dtype != np.float64 or len(y) != len(X):
            X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, multi_output=True, reset=first)
        else:
            X = read_inputs(self, X)
            check_finite("y", y)
        columns = np.asarray(y, np.float64).reshape(len(y), -1)
        if first:
            self._flat = np.ndim(y) == 1
            self._start(X.shape[1], columns.shape[1])
        elif columns.shape[1] != self.n_targets_:
            raise ValueError(f"y must have {self.n_targets_} target(s) as before, got shape {np.shape(y)}")
        for x, target in zip(torch.from_numpy(X.astype(np.float32)), torch.from_numpy(columns.astype(np.float32))):
            self.networks_.update(x[None], target[None])
        return self

    def _start(self, n_inputs: int, n_targets: int) -> None:
        self.n_features_in_, self.n_targets_ = n_inputs, n_targets
        seed = self.random_state if self.random_state is not None else int(np.random.default_rng().integers(2**31))
        self.networks_ = StreamNetworks(
            n_inputs,
            n_targets,
            hidden=self.hidden,
            activation=self.activation,
            lr=self.lr,
            memory=self.memory,
            memory_size=self.memory_size,
            batch_size=self.batch_size,
            steps_per_sample=self.steps_per_sample,
            si_strength=self.si_strength,
            si_period=self.si_period,
            generator=torch.Generator().manual_seed(int(seed)),
        )

    def predict(self, X: Any) -> Float[ndarray, "..."]:
        """Predictions (n,) or (n, n_targets), as y was."""
        check_is_fitted(self)
        X = read_inputs(self, X)
        out = self.networks_.predict(torch.from_numpy(X.astype(np.float32))[None])[0].numpy().astype(np.float64)
        return out[:, 0] if self._flat else out

    def state_dict(self) -> dict[str, Any]:
        """The network's state with its widths; nothing but that it is unfitted before the first sample."""
        if not hasattr(self, "networks_"):
            return {"fitted": False}
        widths = [self.n_features_in_, self.n_targets_]
        return {"fitted": True, "flat": self._flat, "widths": widths, "networks": self.networks_.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError, and nothing changed, if its networks had other shapes."""
        fresh = clone(self)
        if state["fitted"]:
            fresh._flat = bool(state["flat"])
            fresh._start(*state["widths"])
            fresh.networks_.load_state_dict(state["networks"])
        take_over(self, fresh)
