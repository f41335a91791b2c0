"""Markov decision processes whose optimal values, gains and spans are known exactly, and their Gymnasium environments.

The processes are plain arrays with exact solvers and need nothing beyond NumPy and SciPy. `worlds` wraps them for
Gymnasium and registers them as `locally/...-v0`; it is imported when a name of it is first used:

>>> import gymnasium
>>> from locally.control.environments import worlds
>>> env = gymnasium.make("locally/RiverSwim-v0", n_states=8)
>>> round(env.unwrapped.mdp.solve().gain, 4)
0.4286
"""

import importlib
from typing import TYPE_CHECKING, Any

from locally.control.environments.adversarial import (
    AdversarialMDP,
    decoy_losses,
    drifting_losses,
    random_adversarial_mdp,
    stationary_losses,
    switching_losses,
)
from locally.control.environments.continuing import (
    access_control_queue,
    garnet,
    random_linear_mdp,
    random_linear_mixture,
    riverswim,
)
from locally.control.environments.episodic import (
    combination_lock,
    missing_arm,
    random_episodic_linear_mdp,
)
from locally.control.environments.processes import (
    ContinuingMDP,
    Episodes,
    EpisodicMDP,
    one_hot_features,
    sample_episodes,
)

if TYPE_CHECKING:
    from locally.control.environments.worlds import AdversarialWorld, ContinuingWorld, EpisodicWorld

WORLDS = ("AdversarialWorld", "ContinuingWorld", "EpisodicWorld")

__all__ = [
    "AdversarialMDP",
    "AdversarialWorld",
    "ContinuingMDP",
    "ContinuingWorld",
    "Episodes",
    "EpisodicMDP",
    "EpisodicWorld",
    "access_control_queue",
    "combination_lock",
    "decoy_losses",
    "drifting_losses",
    "garnet",
    "missing_arm",
    "one_hot_features",
    "random_adversarial_mdp",
    "random_episodic_linear_mdp",
    "random_linear_mdp",
    "random_linear_mixture",
    "riverswim",
    "sample_episodes",
    "stationary_losses",
    "switching_losses",
]


def __getattr__(name: str) -> Any:
    if name in WORLDS:
        return getattr(importlib.import_module("locally.control.environments.worlds"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
