"""Gymnasium's own checks, the promise that draws agree with the plain processes, and life without Gymnasium."""

import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from locally.control.average_reward import Walk
from locally.control.environments import random_adversarial_mdp, riverswim, worlds


@pytest.mark.parametrize("name", list(worlds.MAKERS))
def test_every_world_passes_gymnasiums_checks_without_a_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(name).unwrapped, skip_render_check=True)


def test_instances_and_sizes_are_arguments():
    one, other = (gymnasium.make("locally/LinearMDP-v0", n_states=5, instance=i).unwrapped.mdp for i in (0, 1))
    assert one.n_states == 5
    assert not np.allclose(one.P, other.P)
    assert gymnasium.make("locally/RiverSwim-v0", n_states=12).observation_space.n == 12


def test_a_world_draws_as_a_walk_does():
    env, walk = worlds.ContinuingWorld(riverswim()), Walk(riverswim(), seed=5)
    state, _ = env.reset(seed=5)
    assert state == walk.state
    for action in np.random.default_rng(0).integers(2, size=500).tolist():
        following, reward, terminated, truncated, _ = env.step(action)
        assert (following, reward) == walk.step(action)
        assert not terminated
        assert not truncated


def test_episodes_end_at_the_horizon_and_ask_for_a_reset():
    env = gymnasium.make("locally/CombinationLock-v0", horizon=3).unwrapped
    env.reset(seed=0)
    endings = [env.step(0)[2] for _ in range(3)]
    assert endings == [False, False, True]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)


def test_oblivious_losses_follow_their_schedule_and_begin_again():
    mdp = random_adversarial_mdp(3, "switching", rng=0)
    env = worlds.AdversarialWorld(mdp)
    episodes = [env.reset(seed=1)[1]["episode"], *(env.reset()[1]["episode"] for _ in range(4))]
    assert episodes == [0, 1, 2, 0, 1]
    np.testing.assert_array_equal(env.thetas_played, mdp.thetas[:2])
    losses = []
    for k in range(400):
        env.reset(seed=k)
        losses.append(env.step(3)[4]["loss"])
    assert np.mean(losses) == pytest.approx(mdp.losses(0)[0, 0, 3], abs=0.1)


def test_an_adaptive_adversary_sees_the_past_and_is_kept():
    mdp = random_adversarial_mdp(10, rng=0)
    lengths = []

    def adversary(k, history):
        lengths.append([len(t) for t in history])
        return np.full((3, 5), 1.0 if k % 2 else 0.0)

    env = worlds.AdversarialWorld(mdp, adversary)
    env.reset(seed=0)
    for _ in range(2):
        losses = [env.step(0)[4]["loss"] for _ in range(3)]
        env.reset()
    assert lengths == [[], [3], [3, 3]]
    assert losses == [1.0, 1.0, 1.0]
    np.testing.assert_array_equal([t[0, 0] for t in env.thetas_played], [0, 1, 0])
    wild = worlds.AdversarialWorld(mdp, lambda k, history: np.full((3, 5), 2.0))
    with pytest.raises(ValueError, match="losses of the adversary"):
        wild.reset(seed=0)


@pytest.mark.parametrize("action", [2, 0.5, np.array([0.2])])
def test_an_action_outside_the_space_is_refused(action):
    env = worlds.ContinuingWorld(riverswim())
    env.reset(seed=0)
    with pytest.raises((TypeError, ValueError), match="action must be"):
        env.step(action)


def test_gymnasium_is_imported_only_when_a_world_is_used_and_named_when_missing():
    code = """
import sys
sys.modules["gymnasium"] = None  # as if it were not installed
from locally.control import environments
print(environments.riverswim().n_states)
try:
    environments.ContinuingWorld
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "6"
    assert "locally[control]" in done.stdout
