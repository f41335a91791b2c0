"""FTPedel: its guarantees over many runs, what a log saves, variants, resuming, and refusals before the first step."""

import math

import jaxtyping
import numpy as np
import pytest

from locally.control.agents import Agent, play
from locally.control.environments import EpisodicMDP, missing_arm
from locally.control.fine_tuning import (
    FTPedel,
    OfflineDataset,
    Status,
    collect,
    deterministic_policies,
    proved_beta_scale,
    reachable,
)

MDP = missing_arm()
POLICIES = deterministic_policies(reachable(MDP), 4)
GAPS = MDP.solve().value - MDP.values(POLICIES)
SCALE = 0.125


@pytest.fixture(autouse=True)
def fast(without_shape_checks):
    """Hundreds of runs: shapes are checked by the doctests and the other files."""


def log_of(samples, seed=0, missing=True, mdp=MDP):
    n = np.full(mdp.R.shape, samples)
    if missing:
        n[1, 2, 3] = 0
    H, S, A = mdp.R.shape
    return OfflineDataset(*collect(mdp, n, np.random.default_rng(seed)), horizon=H, n_states=S, n_actions=A)


def learner(offline=None, **change):
    options = {"epsilon": 0.4, "beta_scale": SCALE, "rng": 0} | change
    return FTPedel(MDP.features, POLICIES, offline, **options)


def small(rng):
    """Two layers, two states, two actions."""
    P, R = rng.dirichlet(np.ones(2), (2, 2, 2)), rng.random((2, 2, 2))
    mdp = EpisodicMDP(P, R, features=np.broadcast_to(np.eye(4).reshape(2, 2, 4), (2, 2, 2, 4)).copy())
    return mdp, deterministic_policies(reachable(mdp), 2)


@pytest.fixture(scope="module")
def many():
    """100 runs on random processes with random logs, beta_scale 1."""
    jaxtyping.config.update("jaxtyping_disable", True)
    runs = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        mdp, policies = small(rng)
        n = rng.integers(0, 3000, mdp.R.shape)
        log = OfflineDataset(*collect(mdp, n, rng), horizon=2, n_states=2, n_actions=2)
        agent = FTPedel(mdp.features, policies, log, epsilon=0.2, beta_scale=1, batch_growth=0.1, rng=rng)
        runs.append((agent.run(mdp), mdp.values(policies)))
    jaxtyping.config.update("jaxtyping_disable", False)
    return runs


def test_the_best_policy_is_not_eliminated(many):
    assert np.mean([values.argmax() in found.alive for found, values in many]) >= 0.95


def test_answers_are_epsilon_optimal(many):
    assert all(found.status is Status.CERTIFIED and found.certificate.valid for found, _ in many)
    gaps = np.array([values.max() - values[found.index] for found, values in many])
    assert np.mean(gaps <= 0.2) >= 0.95
    assert np.mean(gaps <= [found.certificate.suboptimality for found, _ in many]) >= 0.95


def test_estimates_stay_within_their_widths(many):
    inside = [(np.abs(found.values - values[found.alive]) <= found.errors).all() for found, values in many]
    assert np.mean(inside) >= 0.95


def test_proved_bound_holds(many):
    assert all(values.max() - values[found.index] <= found.certificate.proved for found, values in many)


def test_no_log_an_empty_log_and_pedel_are_the_same():
    runs = [learner(offline).run(MDP) for offline in (None, OfflineDataset.empty(2, 3, 4))]
    assert runs[0].history == runs[1].history
    np.testing.assert_array_equal(runs[0].values, runs[1].values)


def test_a_complete_log_needs_no_episode():
    found = learner(log_of(100_000, missing=False), epsilon=0.2).run(MDP)
    assert (found.n_episodes, found.status) == (0, Status.CERTIFIED)
    assert GAPS[found.index] == pytest.approx(0, abs=1e-12)
    assert GAPS[found.alive].max() < 2 * found.history[-1].accuracy + 0.02  # what is left is within the last threshold
    assert found.certificate.suboptimality == pytest.approx(2 * 2**-5)


def test_a_log_saves_episodes_and_design_beats_uniform():
    log = log_of(20_000)
    ours, alone = learner(log).run(MDP), learner().run(MDP)
    uniform, exact = learner(log, explorer="uniform").run(MDP), learner(log, explorer="exact", dynamics=MDP.P).run(MDP)
    assert ours.n_episodes < 0.3 * alone.n_episodes
    assert ours.n_episodes < 0.3 * uniform.n_episodes
    assert exact.n_episodes <= 1.1 * ours.n_episodes
    assert max(GAPS[run.index] for run in (ours, alone, uniform, exact)) <= 0.4


def test_design_spends_no_more_than_water_filling():
    """One layer, equal arms, nobody eliminated: each arm must reach beta / eps^2 pulls, the log counts."""
    mdp = EpisodicMDP(np.ones((1, 1, 3, 1)), np.full((1, 1, 3), 0.5), features=np.eye(3).reshape(1, 1, 3, 3))
    pulls = np.array([[[5000, 0, 30]]])
    log = OfflineDataset(*collect(mdp, pulls, np.random.default_rng(0)), horizon=1, n_states=1, n_actions=3)
    found = FTPedel(mdp.features, deterministic_policies((1, 1), 3), log, epsilon=1, ridge=1e-3, rng=0).run(mdp)
    assert found.alive.size == 3
    last = found.history[-1]
    wanted = math.ceil(last.beta / last.accuracy**2)
    least = np.maximum(wanted - pulls, 0).sum()
    assert least <= found.n_episodes <= least + 3 * 20


def test_beta_is_the_formula():
    agent = learner(delta=0.05, epsilon=0.2)
    assert agent.beta() == pytest.approx(SCALE * 4 * math.log(16 * 256 / 0.05))
    assert agent.n_phases == 5
    found = agent.run(MDP)
    for phase in found.history:
        assert phase.beta == pytest.approx(SCALE * 4 * math.log(16 * phase.alive * phase.number**2 / 0.05))
        assert phase.width**2 <= 1.05 * phase.accuracy**2 / phase.beta  # earlier layers moved since it was reached


@pytest.mark.parametrize("schedule", ["adaptive", "doubling"])
def test_fresh_data_for_every_phase_and_layer(schedule):
    log = log_of(4000)
    agent = learner(log, reuse_data=False, schedule=schedule, design_steps=10)
    found = agent.run(MDP)
    assert found.certificate.fresh_data
    assert GAPS[found.index] <= 0.4
    share = log.shares(agent.n_phases, np.random.default_rng(0))[-1]
    used = np.trace(agent._moments.covariance, axis1=1, axis2=2)  # one-hot: transitions used by the last estimate
    played = found.history[-1].episodes
    offline = np.bincount(log.layers[share], minlength=2)
    if schedule == "adaptive":
        np.testing.assert_allclose(used, offline + np.array(played))
    else:  # only the last round counts
        assert (used <= offline + np.array(played)).all()
        assert found.n_episodes == sum(map(sum, (phase.episodes for phase in found.history)))


def test_doubling_rounds_double():
    agent = learner(schedule="doubling", design_steps=4)
    spent = [phase.episodes for phase in agent.run(MDP).history]
    for layers in spent:
        for episodes in layers:
            assert episodes == 0 or math.log2(episodes / 20 + 1).is_integer()


def test_warm_up_reaches_its_eigenvalue_where_it_can():
    """In layer 1 every direction can be reached; in layer 0 states 1 and 2 cannot, and the cap ends it."""
    agent = learner(warm_up=8.0, warm_up_episodes=700)
    found = agent.run(MDP)
    assert found.history[0].number == 0
    assert found.history[0].episodes[0] >= 700
    assert np.linalg.eigvalsh(agent._known.covariance[1])[0] + agent.ridge >= 8
    assert found.status is Status.CERTIFIED


def test_episode_limit_is_not_a_certificate():
    found = learner(max_episodes=130, epsilon=0.1).run(MDP)
    assert (found.n_episodes, found.status) == (130, Status.EPISODE_LIMIT)
    assert not found.certificate.valid
    assert found.certificate.suboptimality == found.certificate.proved == np.inf


def test_proved_scale():
    """At the proved scale the Hoeffding bound at the end of a phase is at most its accuracy, but for the ridge."""
    for H in (1, 2, 5):
        beta = proved_beta_scale(H) * H**2
        assert sum((H - h) * math.sqrt(0.5) / math.sqrt(beta) for h in range(H)) == pytest.approx(1)


def test_same_seed_same_run_and_interruptions_leave_no_trace():
    log = log_of(300)
    whole = learner(log).run(MDP)
    agent = learner(log)
    first = agent.run(MDP, callback=lambda episodes, _: episodes >= 100)
    assert first.status is Status.EXPLORING
    resumed = learner(log, rng=99)
    resumed.load_state_dict(agent.state_dict())
    for again in (agent.run(MDP), resumed.run(MDP)):
        assert again.history == whole.history
        np.testing.assert_array_equal(again.values, whole.values)


@pytest.mark.parametrize("reuse_data", [True, False])
def test_an_agent_resumes_in_the_middle_of_an_episode(reuse_data):
    agent, twin = (learner(log_of(300), reuse_data=reuse_data, rng=seed) for seed in (0, 1))
    assert isinstance(agent, Agent)
    rng = np.random.default_rng(0)

    def walk(agent, place, steps, rng):
        for _ in range(steps):
            h, s = place
            a = agent.act(place)
            following = (h + 1, int(rng.choice(3, p=MDP.P[h, s, a])))
            agent.observe(place, a, float(rng.random() < MDP.R[h, s, a]), following, terminated=h == 1)
            place = (0, 0) if h == 1 else following
        return place

    place = walk(agent, (0, 0), 1501, rng)
    assert place[0] == 1
    state, draws = agent.state_dict(), rng.bit_generator.state
    walk(agent, place, 2000, rng)
    twin.load_state_dict(state)
    rng.bit_generator.state = draws
    walk(twin, place, 2000, rng)
    ours, theirs = agent.state_dict(), twin.state_dict()
    assert ours["progress"] == theirs["progress"]
    assert ours["progress"][2] > 750
    assert ours["rng"] == theirs["rng"]
    for name, array in ours["arrays"].items():
        np.testing.assert_array_equal(array, theirs["arrays"][name])


def test_state_of_another_learner_is_refused():
    with pytest.raises(ValueError, match="epsilon"):
        learner().load_state_dict(learner(epsilon=0.2).state_dict())
    with pytest.raises(ValueError, match="offline"):
        learner().load_state_dict(learner(log_of(3)).state_dict())


def test_a_damaged_state_is_refused_and_changes_nothing():
    agent = learner()
    agent.run(MDP, callback=lambda episodes, _: episodes >= 50)
    before = agent.state_dict()
    arrays = before["arrays"]
    for damaged, message in (
        ({"arrays": arrays | {"seen": arrays["seen"][:1]}}, "seen"),
        ({"arrays": arrays | {"upper": np.zeros(1)}}, "upper"),
        ({"alive": before["alive"] + 10**6}, "alive"),
        ({"alive": before["alive"][:0]}, "alive"),
        ({"status": "asleep"}, "asleep"),
    ):
        with pytest.raises(ValueError, match=message):
            agent.load_state_dict(before | {"phase": 7} | damaged)
    after = agent.state_dict()
    assert after["progress"] == before["progress"]
    for name, array in after["arrays"].items():
        np.testing.assert_array_equal(array, arrays[name])


def test_plays_in_gymnasium_until_it_is_certified():
    gymnasium = pytest.importorskip("gymnasium")
    from locally.control.environments import worlds  # noqa: F401 - registers

    env = gymnasium.make("locally/MissingArm-v0")
    agent = learner(log_of(20_000))
    play(agent, env, 20_000, seed=0, callback=lambda *_: agent.status is not Status.EXPLORING)
    assert agent.status is Status.CERTIFIED
    assert 0 < agent.n_episodes < 2000
    found = agent.result()
    assert GAPS[found.index] <= 0.4
    before = agent.n_episodes
    rewards = play(agent, env, 4000, seed=1)  # the answer, by now without learning
    assert agent.n_episodes == before
    assert 2 * rewards.mean() == pytest.approx(MDP.values(found.policy[None])[0], abs=0.05)


def test_importing_the_room_needs_no_gymnasium():
    import subprocess
    import sys

    code = "import sys, locally.control.fine_tuning; sys.exit('gymnasium' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": 2 * MDP.features}, "features must have Euclidean norm at most 1"),
        ({"features": np.where(np.arange(12) == 5, 0, MDP.features)}, r"features must span R\^12 .* layer 0 span 11"),
        ({"features": np.full_like(MDP.features, np.nan)}, "features holds NaN"),
        ({"features": MDP.features[0]}, "features must have shape"),
        ({"features": MDP.features[:0]}, "horizon"),
        ({"policies": POLICIES[:, :1]}, "policies must have shape"),
        ({"policies": POLICIES[:0]}, "number of policies"),
        ({"policies": 2 * POLICIES}, "policies must sum to 1"),
        ({"epsilon": 0}, "epsilon"),
        ({"epsilon": 2.5}, "epsilon must be at most the horizon 2"),
        ({"epsilon": np.nan}, "epsilon"),
        ({"delta": 0}, "delta"),
        ({"delta": 1}, "delta"),
        ({"beta_scale": 0}, "beta_scale"),
        ({"ridge": -1}, "ridge"),
        ({"bonus": -1}, "bonus"),
        ({"sharpness": 0}, "sharpness"),
        ({"warm_up": -1}, "warm_up"),
        ({"batch_growth": 2}, "batch_growth"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_episodes": 0}, "max_episodes"),
        ({"explorer": "greedy"}, "explorer"),
        ({"schedule": "never"}, "schedule"),
        ({"explorer": "exact"}, "dynamics"),
        ({"explorer": "exact", "dynamics": 2 * MDP.P}, "dynamics"),
        ({"start": np.array([0.5, 0.5])}, "start"),
        ({"offline": OfflineDataset.empty(3, 3, 4)}, "offline must have"),
    ],
)
def test_bad_input_is_named_before_the_first_step(change, message):
    arguments = {"features": MDP.features, "policies": POLICIES, "epsilon": 0.4} | change
    with pytest.raises(ValueError, match=message):
        FTPedel(**arguments)


def test_a_process_or_log_that_does_not_fit_is_named_before_the_first_episode():
    agent = learner()
    with pytest.raises(ValueError, match="mdp must have"):
        agent.run(EpisodicMDP(np.ones((1, 1, 1, 1)), np.ones((1, 1, 1))))
    with pytest.raises(ValueError, match="start"):
        agent.run(EpisodicMDP(MDP.P, MDP.R, start=np.array([0.0, 1.0, 0.0])))
    with pytest.raises(ValueError, match="dynamics"):
        learner(explorer="exact", dynamics=MDP.P[:, :, ::-1].copy()).run(MDP)
    impossible = OfflineDataset([0], [0], [0], [0.0], [2], horizon=2, n_states=3, n_actions=4)
    with pytest.raises(ValueError, match="impossible transition: row 0"):
        learner(impossible).run(MDP)
    assert agent.n_episodes == 0


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (((0, 3), 0, 0.0, (1, 0)), "state of observation"),
        (((2, 0), 0, 0.0, (2, 0)), "layer of observation"),
        ((0, 0, 0.0, (1, 0)), "observation must be a pair"),
        (((0, 0), 4, 0.0, (1, 0)), "action"),
        (((0, 0), 0, 1.5, (1, 0)), "reward"),
        (((0, 0), 0, math.nan, (1, 0)), "reward"),
        (((0, 0), 0, 0.0, (2, 0)), "layer by layer"),
    ],
)
def test_bad_steps_are_named_and_not_counted(step, message):
    agent = learner()
    with pytest.raises(ValueError, match=message):
        agent.observe(*step)
    with pytest.raises(ValueError, match="layer by layer"):
        agent.observe((0, 0), 0, 0.0, (1, 0), truncated=True)
    assert not agent.state_dict()["arrays"]["seen"].any()
    agent.observe((0, 0), 0, 0.0, (1, 0))
    with pytest.raises(ValueError, match="middle of a batch"):
        agent.run(MDP)
