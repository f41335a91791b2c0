"""A world model: any regressor that learns by `partial_fit`, in the terms of a Gymnasium environment."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from sklearn.base import clone

from locally.checks import check_choice, check_count, check_finite, check_shape
from locally.control.validity import checked_arrays
from locally.control.world_model.regression import LosseFTLRegressor
from locally.control.world_model.spaces import ActionCode, check_box, check_vector

Scaling = tuple[ndarray, ndarray]


class Prediction(NamedTuple):
    """What a model says of a batch of n steps."""

    next_observations: Float[ndarray, "n n_observed"]
    rewards: Float[ndarray, " n"]
    termination: Float[ndarray, " n"]  # regressed indicator, clipped to [0, 1]

    @property
    def terminated(self) -> Bool[ndarray, " n"]:
        """Whether the predicted termination is above one half."""
        return self.termination > 0.5


class WorldModel:
    """Regresses change of observation, reward and termination on observation and action, one transition at a time.

    Observations are scaled to [-1, 1] by the limits of their space, or by mean and standard deviation over the first
    `warm_up` transitions; the scale is frozen from then on, since another one would invalidate what was learnt. Where
    the environment is random the model predicts the mean. Observations of integer type are rounded.

    Args:
        regressor: has `partial_fit(X, y)` and `predict(X)` for y of several columns, and `get_params` as scikit-learn
            estimators do; `state_dict` and `load_state_dict` where the model is to be saved. It is cloned.
        observation_space: a Box with one dimension.
        action_space: Discrete or a Box with one dimension and finite limits.
        scaling: "limits", "warm-up", "auto" (limits where all are finite), or (centre, width) of each observation.
        warm_up: transitions that are collected before the scale is frozen; they are then learnt in order.
        per_action: a model of its own for each discrete action, instead of the action as an input.
        target_scale: divides (change of each observation, reward, termination); ones by default, standard deviations
            of the warm-up where there is one. Linear models do not need it, networks do.

    Raises:
        TypeError: a space is of another kind, or the regressor lacks a method.
        ValueError: an argument is out of range; scaling by limits that are infinite.

    Complexity: that of the regressor.

    References: arXiv 2401.13034, section 2.3.
    """

    def __init__(
        self,
        regressor: Any,
        observation_space: Any,
        action_space: Any,
        *,
        scaling: str | Scaling = "auto",
        warm_up: int = 1000,
        per_action: bool = False,
        target_scale: Any = None,
    ) -> None:
        check_box("observation_space", observation_space)
        self.actions = ActionCode(action_space)
        if per_action and not self.actions.n_discrete:
            raise ValueError("per_action must be False for a Box of actions")
        for method in ("partial_fit", "predict", "get_params"):
            if not hasattr(regressor, method):
                raise TypeError(f"regressor must have {method}, got {type(regressor).__name__}")
        check_count("warm_up", warm_up)
        self.n_observed = observation_space.shape[0]
        self.low, self.high = observation_space.low, observation_space.high
        self.integers = np.issubdtype(observation_space.dtype, np.integer)
        self.warm_up, self.per_action = warm_up, per_action
        self.regressors = [clone(regressor) for _ in range(self.actions.n_discrete if per_action else 1)]
        self.waiting: list[tuple[ndarray, ndarray, ndarray]] = []  # observation, action code, targets
        self.scale = self._initial_scale(scaling, observation_space)
        self.given_target_scale = target_scale is not None
        self.target_scale = np.ones(self.n_observed + 2)
        if target_scale is not None:
            self.target_scale = np.array(target_scale, np.float64)
            check_shape("target_scale", self.target_scale, (self.n_observed + 2,))
            if not (np.isfinite(self.target_scale).all() and (self.target_scale > 0).all()):
                raise ValueError(f"target_scale must be positive and finite, got {target_scale}")
        self.n_seen = 0

    def _initial_scale(self, scaling: str | Scaling, space: Any) -> Scaling | None:
        if not isinstance(scaling, str):
            centre, width = (np.array(part, np.float64) for part in scaling)
            for name, part in (("centre", centre), ("width", width)):
                check_shape(f"scaling: {name}", part, (self.n_observed,))
                check_finite(f"scaling: {name}", part)
            if not (width > 0).all():
                raise ValueError(f"scaling: width must be positive, got {width}")
            return centre, width
        check_choice("scaling", scaling, ("auto", "limits", "warm-up"))
        if scaling == "warm-up" or (scaling == "auto" and not space.is_bounded()):
            return None
        check_box("observation_space", space, bounded=True)
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        return (high + low) / 2, np.where(high > low, (high - low) / 2, 1.0)

    @property
    def ready(self) -> bool:
        """Whether it can predict: something was learnt."""
        return self.n_seen > len(self.waiting)

    def update(self, observation: Any, action: Any, reward: float, next_observation: Any, terminated: Any) -> None:
        """Learn one transition.

        Raises:
            ValueError: an observation or action does not fit its space, or something is NaN or infinite; nothing is
                learnt.
        """
        before = check_vector("observation", observation, self.n_observed)
        after = check_vector("next_observation", next_observation, self.n_observed)
        action = self.actions.check(action)
        if not np.isfinite(reward):
            raise ValueError(f"reward must be finite, got {reward}")
        targets = np.concatenate([after - before, [reward, float(terminated)]])
        self.n_seen += 1
        if self.scale is not None:
            self._learn(before, self.actions.encode(np.asarray(action)[None])[0], targets)
            return
        self.waiting.append((before, self.actions.encode(np.asarray(action)[None])[0], targets))
        if len(self.waiting) == self.warm_up:
            self._freeze()

    def _freeze(self) -> None:
        before, _, targets = (np.array(part) for part in zip(*self.waiting))
        self.scale = before.mean(axis=0), _spread(before)
        if not self.given_target_scale:
            self.target_scale = _spread(targets)
        for transition in self.waiting:
            self._learn(*transition)
        self.waiting.clear()

    def _learn(self, observation: ndarray, code: ndarray, targets: ndarray) -> None:
        X = self._inputs(observation[None], code[None])
        regressor = self.regressors[int(code.argmax())] if self.per_action else self.regressors[0]
        regressor.partial_fit(X, (targets / self.target_scale)[None])

    def _inputs(self, observations: ndarray, codes: ndarray) -> Float[ndarray, "n width"]:
        assert self.scale is not None
        scaled = (observations - self.scale[0]) / self.scale[1]
        return scaled if self.per_action else np.hstack([scaled, codes])

    def predict(self, observations: Any, actions: Any) -> Prediction:
        """What follows on n observations (n, n_observed) and actions (n,) or (n, width).

        Raises:
            RuntimeError: nothing was learnt yet.
            ValueError: a shape is wrong, or something is NaN or infinite.
        """
        if not self.ready:
            raise RuntimeError(f"nothing was learnt yet: {self.n_seen} transitions seen, warm_up={self.warm_up}")
        before = np.asarray(observations, np.float64)
        check_shape("observations", before, (None, self.n_observed))
        codes = self.actions.encode(np.asarray(actions))
        check_shape("actions", codes, (len(before), self.actions.width))
        check_finite("observations", before)
        outputs = self._predict_targets(self._inputs(before, codes), codes) * self.target_scale
        after = before + outputs[:, : self.n_observed]
        if self.integers:
            after = np.rint(after)
        after = np.clip(after, self.low, self.high)
        return Prediction(after, outputs[:, -2], np.clip(outputs[:, -1], 0, 1))

    def _predict_targets(self, X: ndarray, codes: ndarray) -> Float[ndarray, "n targets"]:
        if not self.per_action:
            return self.regressors[0].predict(X)
        outputs = np.zeros((len(X), self.n_observed + 2))  # no change, for actions that were never taken
        chosen = codes.argmax(axis=1)
        for a in np.unique(chosen):
            if hasattr(self.regressors[a], "n_features_in_"):
                outputs[chosen == a] = self.regressors[a].predict(X[chosen == a])
        return outputs

    def state_dict(self) -> dict[str, Any]:
        """Scales, transitions that wait for them, and the regressors' own states."""
        return {
            "n_seen": self.n_seen,
            "scale": None if self.scale is None else [part.copy() for part in self.scale],
            "target_scale": self.target_scale.copy(),
            "waiting": [[part.copy() for part in transition] for transition in self.waiting],
            "regressors": [regressor.state_dict() for regressor in self.regressors],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError for other widths or another number of regressors.

        Nothing has changed where it raises.
        """
        if len(state["regressors"]) != len(self.regressors):
            raise ValueError(f"state must hold {len(self.regressors)} regressor(s), got {len(state['regressors'])}")
        target_scale = checked_arrays(state, {"target_scale": self.target_scale})["target_scale"]
        observed = np.empty(self.n_observed)
        scale = None
        if state["scale"] is not None:
            centre, width = (checked_arrays({"scale": part}, {"scale": observed})["scale"] for part in state["scale"])
            scale = centre, width
        here = {"observation": observed, "code": np.empty(self.actions.width), "targets": self.target_scale}
        waiting = [checked_arrays(dict(zip(here, transition)), here) for transition in state["waiting"]]
        n_seen = int(state["n_seen"])
        regressors = [clone(regressor) for regressor in self.regressors]
        for regressor, saved in zip(regressors, state["regressors"]):
            regressor.load_state_dict(saved)
        self.n_seen, self.scale, self.target_scale, self.regressors = n_seen, scale, target_scale, regressors
        self.waiting = [(w["observation"], w["code"], w["targets"]) for w in waiting]


class LosseWorldModel(WorldModel):
    """`WorldModel` on a `LosseFTLRegressor`.

    Args:
        observation_space, action_space, scaling, warm_up, per_action: of the `WorldModel`.
        regression: arguments of the `LosseFTLRegressor`.

    >>> from gymnasium.spaces import Box, Discrete
    >>> model = LosseWorldModel(Box(-1, 1, (2,)), Discrete(2), n_grids=8, random_state=0)
    >>> model.update([0.5, 0.0], 1, 1.0, [0.6, 0.0], terminated=False)
    >>> model.predict([[0.5, 0.0]], [1]).next_observations.round(2)
    array([[0.6, 0. ]])
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        *,
        scaling: str | Scaling = "auto",
        warm_up: int = 1000,
        per_action: bool = False,
        **regression: Any,
    ) -> None:
        regressor = LosseFTLRegressor(**regression)
        super().__init__(
            regressor, observation_space, action_space, scaling=scaling, warm_up=warm_up, per_action=per_action
        )


def _spread(values: Float[ndarray, "n width"]) -> Float[ndarray, " width"]:
    """Standard deviations, one where nothing varies."""
    deviation = values.std(axis=0)
    return np.where(deviation > 1e-8, deviation, 1.0)
