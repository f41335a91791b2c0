"""FTPedel: policies are eliminated in phases, each by just the episodes that the log leaves necessary.

Phase l wants every value of the policies still alive to within eps_l = 2^(-l). Layer by layer it explores until the
log and the episodes together make the feature visitations of all of them narrow enough, estimates all values by least
squares, and drops what is 2 eps_l below the best. If the log alone is enough, no episode is played.
Source: arXiv 2211.04974, Algorithm FTPedel; without a log it is Pedel, arXiv 2207.02575.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_choice, check_count, check_nonnegative, check_positive, check_shape
from locally.control.environments import EpisodicMDP
from locally.control.fine_tuning.design import attention_reward
from locally.control.fine_tuning.estimation import Fit, Moments, check_features
from locally.control.fine_tuning.exploration import exact_policy, optimistic_policy, play_episodes
from locally.control.fine_tuning.offline import OfflineDataset
from locally.control.fine_tuning.policies import average_features
from locally.control.fine_tuning.results import Certificate, FineTuningResult, Phase, Status, proved_beta_scale
from locally.control.validity import TOLERANCE, check_generator_state, check_index, check_kernel, checked_arrays

Explorer = Literal["optimistic", "exact", "uniform"]
Schedule = Literal["adaptive", "doubling"]


class FTPedel:
    """Finds a policy within epsilon of the best of a class, with few online episodes and a certificate.

    Run it on an `EpisodicMDP` by `run`, or let it act in a Gymnasium environment with observations (h, s) by
    `locally.control.agents.play`; `status` says when it is done. After that it acts by the policy it found and learns
    no more. `state_dict` holds everything, and a learner that loads it goes on with the same draws.

    Args:
        features: phi_h(s, a), of norm at most 1, spanning R^d at every layer. One-hot where nothing better is known.
        policies: the class Pi, probabilities of actions; what is found is relative to the best of them.
        offline: the log; None or an empty one gives Pedel.
        epsilon: accuracy of the answer's value, in (0, H].
        delta: probability of failure, in (0, 1).
        beta_scale: confidence widths are beta_l = beta_scale H^2 log(4 H^2 |Pi_l| l^2 / delta). The theory is covered
            from (H + 1)^2 / 8 on, with fresh data; smaller ones are for practice and calibrated by simulation.
        ridge: lambda, positive. It biases visitations towards zero where little was seen; never near 1.
        reuse_data: estimate from everything at every step, as one would, which breaks the independence that the
            proof is built on. False is the proof's setting: fresh episodes for every phase and layer, and of the log
            one share for each phase.
        schedule: "adaptive" plans anew every batch and stops at the first that suffices; "doubling" stops only after
            rounds that double, each of `design_steps` steps, as in the proof.
        batch_size: episodes of a batch, and of the first round; at least 1.
        batch_growth: a batch is at least this share of the episodes so far, in [0, 1]: few, long batches late on.
        design_steps: Frank-Wolfe steps of a doubling round.
        explorer: "optimistic" learns transitions while it explores; "exact" is told them in `dynamics`; "uniform"
            takes actions at random, to compare with.
        bonus: factor of the optimistic explorer's bonus H ||phi||, not negative.
        sharpness: of the design's soft maximum, in units of 1 / (largest width).
        warm_up: smallest eigenvalue of Lambda_h to reach at every layer before the first phase (conditioned
            covariance); 0 for none.
        warm_up_episodes: at most so many for each layer, since not all directions may be reachable.
        max_episodes: stop without an answer that is certified after so many.
        start: distribution of the first state; state 0 by default.
        dynamics: P[h, s, a, s'], for the exact explorer.
        rng: seed or generator.

    Raises:
        TypeError, ValueError: features leave the unit ball or do not span, a policy is no distribution, the log does
            not fit the features, or a number is out of range. All of it before the first step.

    Complexity: O(|Pi| H d (S + d) + H d^3) a batch and O(|Pi| H S d) memory, whatever the number of episodes.

    >>> from locally.control.environments import missing_arm
    >>> from locally.control.fine_tuning import deterministic_policies, reachable
    >>> mdp = missing_arm()
    >>> found = FTPedel(mdp.features, deterministic_policies(reachable(mdp), 4), epsilon=0.4, rng=0).run(mdp)
    >>> found.status.value, bool(mdp.solve().value - mdp.values(found.policy[None]) <= 0.4)
    ('certified', True)
    """

    def __init__(
        self,
        features: Float[ndarray, "H S A d"],
        policies: Float[ndarray, "n H S A"],
        offline: OfflineDataset | None = None,
        *,
        epsilon: float | int,
        delta: float | int = 0.1,
        beta_scale: float | int = 0.5,
        ridge: float | int = 1e-2,
        reuse_data: bool = True,
        schedule: Schedule = "adaptive",
        batch_size: int = 20,
        batch_growth: float | int = 0.02,
        design_steps: int = 50,
        explorer: Explorer = "optimistic",
        bonus: float | int = 0.3,
        sharpness: float | int = 5.0,
        warm_up: float | int = 0.0,
        warm_up_episodes: int = 1000,
        max_episodes: int | None = None,
        start: Float[ndarray, " S"] | None = None,
        dynamics: Float[ndarray, "H S A S"] | None = None,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        check_features(features)
        H, S, A, _ = features.shape
        check_shape("policies", policies, (None, H, S, A))
        check_count("number of policies", len(policies))
        check_kernel("policies", policies)
        check_positive("epsilon", epsilon)
        if epsilon > H:
            raise ValueError(f"epsilon must be at most the horizon {H}, the range of values, got {epsilon!r}")
        check_positive("delta", delta, below=1)
        for name, number in {"beta_scale": beta_scale, "ridge": ridge, "sharpness": sharpness}.items():
            check_positive(name, number)
        check_nonnegative("bonus", bonus)
        check_nonnegative("warm_up", warm_up)
        if not 0 <= batch_growth <= 1:
            raise ValueError(f"batch_growth must lie in [0, 1], got {batch_growth!r}")
        counts = {"batch_size": batch_size, "design_steps": design_steps, "warm_up_episodes": warm_up_episodes}
        for name, count in (counts | ({} if max_episodes is None else {"max_episodes": max_episodes})).items():
            check_count(name, count)
        check_choice("explorer", explorer, ("optimistic", "exact", "uniform"))
        check_choice("schedule", schedule, ("adaptive", "doubling"))
        if (dynamics is not None) != (explorer == "exact"):
            raise ValueError("dynamics must be given with the exact explorer, and only with it")
        if dynamics is not None:
            check_shape("dynamics", dynamics, (H, S, A, S))
            check_kernel("dynamics", dynamics)
        start = np.eye(S)[0] if start is None else start
        check_shape("start", start, (S,))
        check_kernel("start", start)
        offline = OfflineDataset.empty(H, S, A) if offline is None else offline
        if (offline.horizon, offline.n_states, offline.n_actions) != (H, S, A):
            sizes = (offline.horizon, offline.n_states, offline.n_actions)
            raise ValueError(f"offline must have (horizon, n_states, n_actions) {(H, S, A)} like features, got {sizes}")

        self.features, self.policies, self.offline = features, policies, offline
        self.epsilon, self.delta, self.beta_scale, self.ridge = epsilon, delta, beta_scale, ridge
        self.reuse_data, self.schedule, self.explorer = reuse_data, schedule, explorer
        self.batch_size, self.batch_growth, self.design_steps = batch_size, batch_growth, design_steps
        self.bonus, self.sharpness, self.max_episodes = bonus, sharpness, max_episodes
        self.warm_up, self.warm_up_episodes = warm_up, warm_up_episodes
        self.start, self.dynamics = start, dynamics
        self.rng = np.random.default_rng(rng)
        self.n_phases = max(math.ceil(math.log2(4 / epsilon)), 1)

        self.status = Status.EXPLORING
        self.phase, self.layer, self.n_episodes = (0 if warm_up > 0 else 1), 0, 0
        self.alive = np.arange(len(policies))
        self.history: list[Phase] = []
        self._averages = average_features(features, policies)
        self._upper = np.full(len(policies), float(H))
        self._lower = np.zeros(len(policies))
        self._spent = np.zeros(H, np.int64)  # episodes of this phase, by the layer they were meant for
        # fresh data: what leads the explorer must not contain this phase's share of the log
        shares = [] if reuse_data else offline.shares(self.n_phases, self.rng)
        self._shares = [self._moments_of(rows) for rows in shares]
        self._moments = self._moments_of(slice(None))
        self._known = self._moments if reuse_data else self._moments_of(slice(0))
        self._playing = np.full((H, S, A), 1 / A)
        self._batch = self._round = self._round_left = 0
        self._seen = np.zeros((H, S, A, S))
        self._paid = np.zeros((H, S, A))
        self._enter_layer()
        self._advance()

    # The algorithm ----------------------------------------------------------------------------------------------------

    def beta(self) -> float:
        """beta_l of the current phase."""
        H = self.horizon
        return self.beta_scale * H**2 * math.log(4 * H**2 * self.alive.size * max(self.phase, 1) ** 2 / self.delta)

    def _advance(self) -> None:
        """Through layers and phases until the next batch is planned, or an answer found."""
        while self.status is Status.EXPLORING:
            fit = self._moments.fit(self.ridge)
            phi = fit.visitations(self._averages, self.start)
            directions, tolerance = self._wanted(fit, phi)
            widest = float(fit.widths_at(self.layer, directions).max())
            capped = self.phase == 0 and self._spent[self.layer] >= self.warm_up_episodes
            if self._round_left == 0 and (widest <= tolerance or capped):
                self._next_layer(fit, phi)
            elif self.max_episodes is not None and self.n_episodes >= self.max_episodes:
                self.status = Status.EPISODE_LIMIT
            else:
                self._plan(fit, phi, directions)
                return
        self._playing = self.policies[self.alive[self._values().argmax()]].copy()

    def _wanted(self, fit: Fit, phi: Float[ndarray, "H n d"]) -> tuple[Float[ndarray, "k d"], float]:
        """The directions that this stage is about, and how narrow they must become."""
        if self.phase == 0:  # all of R^d, until no eigenvalue is below the mark
            return np.linalg.eigh(fit.inverse[self.layer])[1].T, 1 / self.warm_up
        return phi[self.layer], self._accuracy**2 / self.beta()

    @property
    def _accuracy(self) -> float:
        return 2.0**-self.phase

    def _next_layer(self, fit: Fit, phi: Float[ndarray, "H n d"]) -> None:
        self.layer += 1
        if self.layer == self.horizon:
            if self.phase > 0:
                self._eliminate(fit, phi)
            else:
                self._record_phase(np.nan)
            self.phase, self.layer = self.phase + 1, 0
            self._spent[:] = 0
        if self.status is Status.EXPLORING:
            self._enter_layer()

    def _enter_layer(self) -> None:
        self._round = self._round_left = 0
        if not self.reuse_data and self.phase > 0:
            self._moments.take_layer(self._shares[self.phase - 1], self.layer)

    def _eliminate(self, fit: Fit, phi: Float[ndarray, "H n d"]) -> None:
        values = fit.values(phi)
        widths = np.sqrt(np.maximum(fit.widths(phi), 0))
        errors = self._radii() @ widths
        self._upper[self.alive] = np.minimum(self._upper[self.alive], values + errors)
        self._lower[self.alive] = np.maximum(self._lower[self.alive], values - errors)
        self._record_phase(float(widths.max()))
        kept = values >= values.max() - 2 * self._accuracy
        self.alive = self.alive[kept]
        self._averages = np.ascontiguousarray(self._averages[:, kept])
        if not self.reuse_data:
            self._known.merge(self._shares[self.phase - 1])
        if self.alive.size == 1 or self.phase == self.n_phases:
            self.status = Status.CERTIFIED

    def _radii(self) -> Float[ndarray, " H"]:
        """What multiplies a width in an error bound that holds for all policies and phases with probability 1 - delta.

        Reward plus value of the next state lies in an interval of length H - h. Fresh data: Hoeffding along phi^,
        which does not depend on them. Reused data: the self-normalised martingale bound, which holds for all
        directions at once and pays for that with log det. Both add the bias of the ridge.
        """
        H, d = self.horizon, self.features.shape[-1]
        lengths = np.arange(H, 0, -1.0)
        if self.reuse_data:
            grown = np.linalg.slogdet(self._moments.covariance / self.ridge + np.eye(d))[1]
            noise = lengths / 2 * np.sqrt(grown + 2 * math.log(H * len(self.policies) / self.delta))
        else:
            noise = lengths * math.sqrt(math.log(4 * H * self.alive.size * self.phase**2 / self.delta) / 2)
        return noise + lengths * math.sqrt(self.ridge * d)

    def _plan(self, fit: Fit, phi: Float[ndarray, "H n d"], directions: Float[ndarray, "k d"]) -> None:
        """Choose the policy and the length of the next batch."""
        if self._round_left == 0:
            grown = math.ceil(self.batch_growth * self.n_episodes)
            doubled = 2 * self._round or self.batch_size
            self._round = max(self.batch_size, grown) if self.schedule == "adaptive" else doubled
            self._round_left = self._round
            if self.schedule == "doubling" and not self.reuse_data and self.phase > 0:
                self._moments.take_layer(self._shares[self.phase - 1], self.layer)  # each round stands alone
        step = self._round if self.schedule == "adaptive" else math.ceil(self._round / self.design_steps)
        room = self.max_episodes - self.n_episodes if self.max_episodes is not None else step
        self._batch = min(step, self._round_left, room)
        if self.explorer == "uniform":
            return
        wishes = np.zeros(self.features.shape[:3])
        # the rest of an episode goes where later layers lack data; with fresh data it must not depend on their outcomes
        for h in range(self.layer, self.horizon if self.reuse_data else self.layer + 1):
            there = directions if h == self.layer else phi[h]
            wishes[h] = attention_reward(there, fit.inverse[h], self.features[h], self.sharpness)
        if self.dynamics is not None:
            self._playing = exact_policy(wishes, self.dynamics, self.layer, self.rng)
        else:
            known = fit if self.reuse_data else self._known.fit(self.ridge)
            self._playing = optimistic_policy(self.features, wishes, known, self.layer, self.bonus, self.rng)

    def _record_phase(self, width: float) -> None:
        spent = tuple(self._spent.tolist())
        self.history.append(Phase(self.phase, self._accuracy, self.beta(), spent, self.alive.size, width))

    def _absorb(self, counts: Float[ndarray, "H S A S"], rewards: Float[ndarray, "H S A"]) -> None:
        """Learn from a whole batch."""
        self.n_episodes += self._batch
        self._spent[self.layer] += self._batch
        self._round_left -= self._batch
        self._known.add(self.features, counts, rewards)
        if not self.reuse_data:
            own = slice(None) if self.phase == 0 else slice(self.layer, self.layer + 1)
            self._moments.add(self.features, counts, rewards, own)
        self._advance()

    def _moments_of(self, rows: Any) -> Moments:
        moments = Moments.zeros(self.horizon, self.features.shape[1], self.features.shape[-1])
        moments.add(self.features, *self.offline.counts(rows))
        return moments

    def _values(self) -> Float[ndarray, " k"]:
        fit = self._moments.fit(self.ridge)
        return fit.values(fit.visitations(self._averages, self.start))

    @property
    def horizon(self) -> int:
        """H, steps of an episode."""
        return self.features.shape[0]

    # How it is run ----------------------------------------------------------------------------------------------------

    def run(
        self, mdp: EpisodicMDP, callback: Callable[[int, "FTPedel"], bool | None] | None = None
    ) -> FineTuningResult:
        """Play episodes of `mdp` until the answer is certified, batch by batch; calling it again goes on.

        Args:
            mdp: what is played in; nothing but samples of it is used.
            callback: called with (episodes so far, self) after every batch; True interrupts.

        Raises:
            ValueError: sizes, start or dynamics are not those that the learner was made for, or the log cannot come
                from this process. Before the first episode.
        """
        if mdp.R.shape != self.features.shape[:3]:
            raise ValueError(f"mdp must have (H, S, A) = {self.features.shape[:3]} like features, got {mdp.R.shape}")
        for name, mine, its in (("start", self.start, mdp.start), ("dynamics", self.dynamics, mdp.P)):
            if mine is not None and np.abs(mine - its).max() > TOLERANCE:
                raise ValueError(f"{name} of mdp must be what the learner was given")
        self.offline.check_possible(mdp)
        if self._seen.any():
            raise ValueError("run cannot go on in the middle of a batch that was played step by step")
        while self.status is Status.EXPLORING:
            self._absorb(*play_episodes(mdp, self._playing, self._batch, self.rng))
            if callback is not None and callback(self.n_episodes, self):
                break
        return self.result()

    def result(self) -> FineTuningResult:
        """The best answer so far, with what certifies it."""
        fit = self._moments.fit(self.ridge)
        phi = fit.visitations(self._averages, self.start)
        values = fit.values(phi)
        beta = self.history[-1].beta if self.status is Status.CERTIFIED else self.beta()
        errors = math.sqrt(beta) * np.sqrt(np.maximum(fit.widths(phi), 0)).sum(axis=0)
        best = int(values.argmax())
        index = int(self.alive[best])
        valid = self.status is Status.CERTIFIED
        left = 0.0 if self.alive.size == 1 else 2 * self._last_accuracy()
        others = np.delete(self._upper, index)
        certificate = Certificate(
            valid=valid,
            suboptimality=left if valid else math.inf,
            proved=max(float(others.max(initial=0.0) - self._lower[index]), 0.0) if valid else math.inf,
            delta=float(self.delta),
            beta_scale=float(self.beta_scale),
            proved_beta_scale=proved_beta_scale(self.horizon),
            fresh_data=not self.reuse_data,
        )
        policy, history = self.policies[index], tuple(self.history)
        return FineTuningResult(
            policy, index, float(values[best]), self.status, certificate, self.n_episodes, self.alive.copy(), values,
            errors, history,
        )  # fmt: skip

    def _last_accuracy(self) -> float:
        return self.history[-1].accuracy if self.history else math.inf

    def act(self, observation: Any) -> int:
        """The action of the current batch's policy, or of the answer once there is one.

        Raises:
            TypeError, ValueError: observation is no pair (h, s) of the process.
        """
        h, s = self._place("observation", observation, self.horizon)
        odds = np.cumsum(self._playing[h, s])
        return int(min(odds.searchsorted(self.rng.random(), side="right"), np.flatnonzero(self._playing[h, s])[-1]))

    def observe(
        self,
        observation: Any,
        action: Any,
        reward: float | int,
        next_observation: Any,
        *,
        terminated: bool = False,
        truncated: bool = False,
    ) -> None:
        """Count one transition, and plan again once the batch's last episode has ended.

        Raises:
            TypeError, ValueError: a pair or the action is out of range, the reward outside [0, 1], or the episode does
                not end with layer H - 1. Nothing is counted then.
        """
        h, s = self._place("observation", observation, self.horizon)
        following = self._place("next_observation", next_observation, self.horizon + 1)
        a = check_index("action", action, self.features.shape[2])
        if not 0 <= reward <= 1:
            raise ValueError(f"reward must lie in [0, 1], got {reward!r}")
        ended = terminated or truncated
        if ended != (h == self.horizon - 1) or following[0] != h + 1:
            raise ValueError(f"episodes must go layer by layer and end after {self.horizon}, got ({h}, ended={ended})")
        if self.status is not Status.EXPLORING:
            return
        self._seen[h, s, a, following[1]] += 1
        self._paid[h, s, a] += reward
        if ended and self._seen[-1].sum() >= self._batch:
            counts, rewards = self._seen.copy(), self._paid.copy()
            self._seen[:], self._paid[:] = 0, 0
            self._absorb(counts, rewards)

    def _place(self, name: str, observation: Any, layers: int) -> tuple[int, int]:
        if np.shape(observation) != (2,):
            raise ValueError(f"{name} must be a pair (layer, state), got {observation!r}")
        return check_index(f"layer of {name}", observation[0], layers), check_index(
            f"state of {name}", observation[1], self.features.shape[1]
        )

    # How it is put away -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, open episodes included: numbers, strings, lists and arrays."""
        return {
            "settings": self._settings(),
            "status": str(self.status),
            "progress": [self.phase, self.layer, self.n_episodes, self._batch, self._round, self._round_left],
            "history": [phase.to_dict() for phase in self.history],
            "arrays": {name: array.copy() for name, array in self._arrays().items()},
            "alive": self.alive.copy(),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the learner must have been constructed with the same arguments.

        Raises:
            ValueError: the state is of a learner with other settings or another bit generator, or damaged; then nothing
                has changed.
        """
        for name, mine in self._settings().items():
            if state["settings"].get(name) != mine:
                raise ValueError(f"state must be of a learner with {name} {mine}, got {state['settings'].get(name)}")
        generator = self.rng.bit_generator.state["bit_generator"]
        if state["rng"]["bit_generator"] != generator:
            raise ValueError(f"state must come from a {generator} generator, got {state['rng']['bit_generator']}")
        check_generator_state(self.rng, state["rng"])
        arrays = checked_arrays(state["arrays"], self._arrays())
        alive = np.array(state["alive"], np.int64)
        if alive.ndim != 1 or alive.size == 0 or not 0 <= alive.min() <= alive.max() < len(self.policies):
            raise ValueError(f"state must hold policies of 0, ..., {len(self.policies) - 1} as alive, got {alive}")
        status, progress = Status(state["status"]), [int(number) for number in state["progress"]]
        history = [Phase.from_dict(phase) for phase in state["history"]]
        self.phase, self.layer, self.n_episodes, self._batch, self._round, self._round_left = progress
        self.rng.bit_generator.state = state["rng"]
        self.status, self.history, self.alive = status, history, alive
        for name, array in self._arrays().items():
            array[...] = arrays[name]
        self._averages = np.ascontiguousarray(average_features(self.features, self.policies)[:, self.alive])

    def _settings(self) -> dict[str, Any]:
        names = (
            "epsilon", "delta", "beta_scale", "ridge", "reuse_data", "schedule", "batch_size", "batch_growth",
            "design_steps", "explorer", "bonus", "sharpness", "warm_up", "warm_up_episodes", "max_episodes",
        )  # fmt: skip
        sizes = {"features": list(self.features.shape), "policies": len(self.policies), "offline": len(self.offline)}
        return sizes | {name: getattr(self, name) for name in names}

    def _arrays(self) -> dict[str, ndarray]:
        """What changes in place, by name."""
        arrays = {"upper": self._upper, "lower": self._lower, "spent": self._spent, "playing": self._playing}
        arrays |= {"seen": self._seen, "paid": self._paid}
        stores = {"known": self._known, "moments": self._moments}
        stores |= {f"share {i}": share for i, share in enumerate(self._shares)}
        for name, store in stores.items():
            fields = {"covariance": store.covariance, "following": store.following, "reward": store.reward}
            arrays |= {f"{name}, {part}": array for part, array in fields.items()}
        return arrays
