"""World models that follow the leader on locality-sensitive sparse codes: one pass, no replay, no forgetting.

A model of the environment is learnt from a single stream, each transition once, and is at every moment (close to) the
least-squares fit to all of it. `DynaAgent` plans on it, with tables, deep Q-learning or a soft actor-critic. Networks
with and without memory stand beside it for comparison. Environments need `locally[control]`. Source: arXiv 2401.13034.
"""

from typing import Any

from locally.control.world_model.actor_critic import SoftActorCritic
from locally.control.world_model.dyna import DynaAgent
from locally.control.world_model.encoding import LosseEncoder, RandomReLU
from locally.control.world_model.forgetting import forgetting_matrix, piecewise_random_walk, squared_losses
from locally.control.world_model.learners import DeepQ, Learner, TabularQ, Transitions
from locally.control.world_model.model import LosseWorldModel, Prediction, WorldModel
from locally.control.world_model.networks import NetworkRegressor, StreamNetworks
from locally.control.world_model.regression import LosseFTLRegressor
from locally.control.world_model.streams import LosseStreams

ENVIRONMENTS = ("Gridworld", "PointMass", "walled_gridworld", "windy_gridworld")

__all__ = [
    "DeepQ",
    "DynaAgent",
    "Gridworld",
    "Learner",
    "LosseEncoder",
    "LosseFTLRegressor",
    "LosseStreams",
    "LosseWorldModel",
    "NetworkRegressor",
    "PointMass",
    "Prediction",
    "RandomReLU",
    "SoftActorCritic",
    "StreamNetworks",
    "TabularQ",
    "Transitions",
    "WorldModel",
    "forgetting_matrix",
    "piecewise_random_walk",
    "squared_losses",
    "walled_gridworld",
    "windy_gridworld",
]


def __getattr__(name: str) -> Any:
    """Environments are classes of Gymnasium, which is imported when the first of them is asked for."""
    if name in ENVIRONMENTS:
        from locally.control.world_model import environments

        return getattr(environments, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
