"""One pass over a drifting stream, a gridworld planned on, and images denoised, beside networks and other codes.

Networks get every learning rate of a list and count with the best of them on the test error. At paper scale agents with
continuous actions follow, on MuJoCo among others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from sklearn.datasets import load_digits
from sklearn.kernel_approximation import RBFSampler

from locally.control.agents import play
from locally.control.world_model import (
    DynaAgent,
    LosseEncoder,
    LosseFTLRegressor,
    LosseWorldModel,
    NetworkRegressor,
    RandomReLU,
    SoftActorCritic,
    StreamNetworks,
    TabularQ,
    WorldModel,
    piecewise_random_walk,
)
from locally.errors import require
from locally.evidence import Run

LOSSE, ONLINE, REPLAY = "Losse-FTL", "online network", "network with full replay"
FREE = "model-free"
ERROR, GOALS, EXACT = "test error", "goals reached", "share of visited transitions predicted exactly"
FORGOTTEN = "share of the first tenth predicted wrongly"
DENOISING = "denoising error"
MOVES = 50  # of the centre of a drifting stream, at every scale
DRIFTS = (0.1, 0.5, 0.9, 0.99)
Row = dict[str, Any]
Part = Callable[[Run, int], dict[str, ndarray] | None]  # of one seed; curves, where it is about streams


@dataclass(frozen=True)
class Study:
    """Sizes of one scale."""

    stream_steps: int
    rates: tuple[float, ...]
    batch_size: int
    memories: dict[str, Row]  # networks with other means against forgetting, by name
    grid_steps: int
    code_length: int  # of the codes compared on images; 0 leaves that out
    images: str  # "digits", bundled with scikit-learn, or "mnist"
    control: tuple[str, ...]
    control_steps: int


OTHERS: dict[str, Row] = {
    "network with a coreset": {"memory": "coreset"},
    "synaptic intelligence": {"si_strength": 0.5},
    "fuzzy tiling network": {"activation": "fta"},
}


def experiment(run: Run) -> None:
    few, all_rates = (1e-3, 3e-3, 1e-2), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    mujoco = ("Pendulum-v1", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
    carry_out(
        run,
        run.pick(
            quick=Study(500, few[:2], 32, {}, 400, 0, "digits", (), 0),
            default=Study(2500, few, 32, {}, 1500, 2000, "digits", (), 0),
            paper=Study(5000, all_rates, 50, OTHERS, 4000, 10_000, "mnist", mujoco, 300_000),
        ),
    )


def carry_out(run: Run, study: Study) -> None:
    if study.control:
        require("gymnasium", "control")
    images = load_images(run, study.images) if study.code_length else None
    # the longer parts first, so that no core is left alone with one
    parts: list[Part] = [partial(continuous_control, name=name, steps=study.control_steps) for name in study.control]
    parts += [partial(drifting_streams, study=study), partial(gridworld, study=study)]
    if images is not None:
        parts.append(partial(compare_codes, images=images, length=study.code_length))
    tasks = [(part, seed) for part in (*parts, check_updates) for seed in run.seeds]
    results = run.parallel(do, tasks, "parts of all seeds")
    plot_streams(run, [curves for curves in results if curves])


def do(run: Run, task: tuple[Part, int]) -> dict[str, ndarray] | None:
    part, seed = task
    torch.set_num_threads(1)
    return part(run, seed)


# What an update promises ----------------------------------------------------------------------------------------------


def check_updates(run: Run, seed: int, steps: int = 200) -> None:
    """The loss on all data before and after each update, and the solved block beside the batch solution by QR."""
    x, y = piecewise_random_walk(steps, 0.9, hold=20, rng=np.random.default_rng([seed, 1]))
    model = LosseFTLRegressor(n_grids=10, scale=2.0, random_state=seed)
    codes = np.zeros((steps, 0))
    rises, gap = 0, 0.0
    for t in range(steps):
        before = model.coef_.copy() if t else None
        model.partial_fit(x[t : t + 1], y[t : t + 1])
        if before is None:
            codes = model.encoder_.transform(x).toarray()
            before = np.zeros_like(model.coef_)
        Phi, ridge = codes[: t + 1], model.eps * (t + 1)
        losses = [np.sum((Phi @ W - y[: t + 1]) ** 2) + ridge * np.sum(W**2) for W in (before, model.coef_)]
        rises += losses[1] > losses[0] * (1 + 1e-12) + 1e-15

        S = model.encoder_.encode(x[t : t + 1])[0][0]
        rest = np.delete(np.arange(codes.shape[1]), S)
        left = y[: t + 1] - Phi[:, rest] @ model.coef_[rest]
        rows = np.vstack([Phi[:, S], np.sqrt(ridge) * np.eye(len(S))])
        batch = np.linalg.lstsq(rows, np.vstack([left, np.zeros((len(S), 1))]))[0]
        gap = max(gap, float(np.abs(batch - model.coef_[S]).max() / max(1.0, np.abs(batch).max())))
    run.record(LOSSE, "updates that raised the loss", rises, seed=seed, updates=steps)
    run.record(LOSSE, "largest difference of the solved block from its batch solution", gap, seed=seed)


# Drifting streams -----------------------------------------------------------------------------------------------------


def drifting_streams(run: Run, seed: int, *, study: Study) -> dict[str, ndarray]:
    """Error after one pass over streams that drift ever more slowly; all networks of a kind are trained at once."""
    streams = [piecewise_random_walk(study.stream_steps, d, hold=study.stream_steps // MOVES, rng=seed) for d in DRIFTS]
    test_x = np.random.default_rng([seed, 2]).normal(0, 0.5, (1000, 1))
    test_y = np.sin(2 * np.pi * test_x**2)
    remembered: dict[str, ndarray] = {}
    errors: dict[str, ndarray] = {LOSSE: np.empty(len(DRIFTS))}
    for i, (x, y) in enumerate(streams):
        model = LosseFTLRegressor(random_state=seed)
        curve = [wrong_share(model.partial_fit(x[rows], y[rows]).predict(first_tenth(x)), y) for rows in tenths(x)]
        errors[LOSSE][i] = np.mean((model.predict(test_x) - test_y) ** 2)
        if DRIFTS[i] == 0.9:
            remembered[LOSSE] = np.array(curve)

    kinds: dict[str, Row] = {ONLINE: {}, REPLAY: {"memory": "replay"}} | study.memories
    for name, options in kinds.items():
        by_rate, curves = train_networks(streams, study, options, seed, test_x, test_y)
        for rate, row in zip(study.rates, by_rate):
            for d, error in zip(DRIFTS, row):
                run.record(name, f"{ERROR} by learning rate", error, seed=seed, drift=d, rate=rate)
        errors[name] = by_rate.min(axis=0)
        remembered[name] = curves[by_rate[:, DRIFTS.index(0.9)].argmin()]

    for name, row in errors.items():
        for d, error in zip(DRIFTS, row):
            run.record(name, ERROR, error, seed=seed, drift=d)
        run.record(name, FORGOTTEN, remembered[name][-1], seed=seed, drift=0.9)
    over_online, over_replay = errors[LOSSE] / errors[ONLINE], errors[LOSSE] / errors[REPLAY]
    run.record(LOSSE, "largest error / online network's error, over drift rates", over_online.max(), seed=seed)
    up_to = np.array(DRIFTS) <= 0.9
    largest = over_replay[up_to].max()
    run.record(LOSSE, "largest error / replay network's error, drift rate up to 0.9", largest, seed=seed)
    return remembered


def train_networks(
    streams: Sequence[tuple[ndarray, ndarray]], study: Study, options: Row, seed: int, test_x: ndarray, test_y: ndarray
) -> tuple[Float[ndarray, "rates drifts"], Float[ndarray, "rates 10"]]:
    """Test errors, and at drift 0.9 the share of the first tenth that is predicted wrongly after each tenth."""
    R, D = len(study.rates), len(DRIFTS)
    networks = StreamNetworks(
        1,
        1,
        n_streams=R * D,
        lr=np.repeat(study.rates, D).tolist(),
        batch_size=study.batch_size,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    xs, ys = (torch.tensor(np.array(part), dtype=torch.float32).repeat(R, 1, 1) for part in zip(*streams))
    early = xs[:, : len(first_tenth(streams[0][0]))]
    curves = np.empty((R, 10))
    x, y = streams[DRIFTS.index(0.9)]
    for tenth, rows in enumerate(tenths(x)):
        for t in range(rows.start, rows.stop):
            networks.update(xs[:, t], ys[:, t])
        guesses = networks.predict(early).numpy().reshape(R, D, -1, 1)[:, DRIFTS.index(0.9)]
        curves[:, tenth] = [wrong_share(guess, y) for guess in guesses]
    inputs = torch.tensor(test_x, dtype=torch.float32).expand(R * D, -1, -1)
    errors = np.mean((networks.predict(inputs).numpy() - test_y) ** 2, axis=(1, 2))
    return errors.reshape(R, D), curves


def tenths(x: ndarray) -> list[slice]:
    ends = np.linspace(0, len(x), 11).astype(int).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


def first_tenth(x: ndarray) -> ndarray:
    return x[tenths(x)[0]]


def wrong_share(guess: ndarray, y: ndarray) -> float:
    """Of the first tenth, by more than 0.3: a fifth of a standard deviation of a sine or so on either side."""
    return float(np.mean(np.abs(guess - first_tenth(y)) > 0.3))


def plot_streams(run: Run, curves: Sequence[dict[str, ndarray]]) -> None:
    from locally.plots import PALETTE, canvas

    figure, (left, right) = canvas(9.0, 3.8, ncols=2)
    names = list(curves[0])
    for name, colour in zip(names, PALETTE):
        rows = [
            [m.value for m in run.measures if (m.method, m.metric, m.setting.get("drift")) == (name, ERROR, d)]
            for d in DRIFTS
        ]
        left.plot(range(len(DRIFTS)), [np.mean(row) for row in rows], "o-", color=colour, label=name)
        left.fill_between(
            range(len(DRIFTS)), [min(r) for r in rows], [max(r) for r in rows], color=colour, alpha=0.15, lw=0
        )
        shares = np.array([memory[name] for memory in curves])
        right.plot(np.arange(1, 11) / 10, shares.mean(axis=0), "o-", color=colour, label=name)
        right.fill_between(
            np.arange(1, 11) / 10, shares.min(axis=0), shares.max(axis=0), color=colour, alpha=0.15, lw=0
        )
    left.set_xticks(range(len(DRIFTS)), [f"{d:g}" for d in DRIFTS])
    left.set(xlabel="drift rate d", ylabel="mean squared error after one pass", yscale="log", title="Accuracy")
    right.set(xlabel="share of the stream seen", ylabel="wrong on its first tenth (error > 0.3)", ylim=(0, 1))
    right.set_title("Forgetting at d = 0.9")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    caption = (
        "Left: test error after one pass over streams that linger the longer the nearer d is to 1; networks with their "
        "best learning rate. Right: how much of the first tenth of a stream is predicted wrongly as the rest goes by. "
        "Bands span the seeds; curves at zero lie upon each other."
    )
    run.figure(figure, "drifting-streams", caption)


# Gridworld ------------------------------------------------------------------------------------------------------------


def gridworld(run: Run, seed: int, *, study: Study) -> None:
    """Tabular Q-learning that plans on a model of a walled grid, or without one."""
    from locally.control.world_model import walled_gridworld

    env = walled_gridworld()
    spaces = env.observation_space, env.action_space
    scales = np.array([1, 1, 1 / 3, 1])
    models: dict[str, WorldModel | None] = {
        LOSSE: LosseWorldModel(
            *spaces,
            n_grids=24,
            n_bins=7,
            eps=1e-6,
            projection="normal",
            scale=(3.0, 3.0, 2.0, 2.0, 2.0, 2.0),
            random_state=seed,
        ),
        ONLINE: WorldModel(NetworkRegressor(random_state=seed), *spaces, target_scale=scales),
        REPLAY: WorldModel(NetworkRegressor(memory="replay", random_state=seed), *spaces, target_scale=scales),
        FREE: None,
    }
    for name, model in models.items():
        env = walled_gridworld()
        learner = TabularQ(*spaces, rng=np.random.default_rng([seed, 3]))
        agent = DynaAgent(learner, model, planning_actions="visited", rng=np.random.default_rng([seed, 4]))
        rewards = play(agent, env, study.grid_steps, seed=seed)
        run.record(name, GOALS, rewards.sum(), seed=seed, steps=study.grid_steps)
        if model is not None:
            run.record(name, EXACT, share_predicted(agent, model, env.after), seed=seed)


def share_predicted(agent: DynaAgent, model: WorldModel, after: Callable[[ndarray, int], ndarray]) -> float:
    """Over the distinct pairs of cell and action that the agent went through."""
    assert agent.starts is not None
    assert agent.done_there is not None
    pairs = np.unique(np.column_stack([agent.starts, agent.done_there])[: agent.n_steps], axis=0)
    truth = np.array([after(pair[:2], int(pair[2])) for pair in pairs])
    found = model.predict(pairs[:, :2], pairs[:, 2]).next_observations
    return float(np.mean((found == truth).all(axis=1)))


# Images ---------------------------------------------------------------------------------------------------------------


def load_images(run: Run, name: str) -> Float[ndarray, "images pixels"]:
    """Pixels in [0, 1]."""
    if name == "digits":
        return load_digits().data / 16
    path = run.data("mnist/mnist.npz", "MNIST as arrays x_train and x_test of 28 x 28 bytes")
    with np.load(path, allow_pickle=False) as file:
        return np.concatenate([file["x_train"], file["x_test"]])[:10_000].reshape(-1, 28 * 28) / 255


def codes_of_length(length: int, width: int) -> dict[str, list[Callable[[int], Any]]]:
    """Untrained encodings of about the same length, each with a list of settings to choose from."""
    sizes = [(length // (nodes * nodes), nodes) for nodes in (3, 4, 6)]
    scales = (1.0, 2.0)
    return {
        LOSSE: [partial(_losse, kappa, nodes - 1, scale, "soft") for kappa, nodes in sizes for scale in scales],
        "hard tile coding": [
            partial(_losse, kappa, nodes, scale, "hard") for kappa, nodes in sizes for scale in scales
        ],
        "random ReLU": [partial(_relu, length, width**-0.5 * scale) for scale in (0.5, 1.0, 2.0)],
        "random Fourier": [partial(_fourier, length, gamma / width) for gamma in (0.03, 0.1, 0.3, 1.0)],
    }


def _losse(kappa: int, bins: int, scale: float, binning: str, seed: int) -> LosseEncoder:
    return LosseEncoder(kappa, 2, bins, scale=scale, binning=binning, random_state=seed)


def _relu(length: int, scale: float, seed: int) -> RandomReLU:
    return RandomReLU(length, scale=scale, random_state=seed)


def _fourier(length: int, gamma: float, seed: int) -> RBFSampler:
    return RBFSampler(n_components=length, gamma=gamma, random_state=seed)


def compare_codes(run: Run, seed: int, *, images: Float[ndarray, "images pixels"], length: int) -> None:
    """Clean pixels regressed on codes of noisy ones; setting and ridge of each encoding chosen on validation images."""
    rng = np.random.default_rng([seed, 5])
    n = len(images)
    clean = images[rng.permutation(n)]
    noisy = clean + rng.normal(0, 0.3, clean.shape)
    train, validation, test = slice(0, n // 3), slice(n // 3, n // 2), slice(n // 2, n)
    X = (noisy - noisy[train].mean(axis=0)) / noisy[train].std(axis=0)
    errors = {}
    for name, settings in codes_of_length(length, X.shape[1]).items():
        tried = [choose_ridge(make(seed).fit(X[train]), X, clean, train, validation) for make in settings]
        chosen = min(tried, key=attrgetter("validation_error"))
        errors[name] = chosen.error(X, clean, test)
        run.record(name, DENOISING, errors[name], seed=seed, length=length)
    others = min(error for name, error in errors.items() if name != LOSSE)
    run.record(LOSSE, f"{DENOISING} / that of the best other encoding", errors[LOSSE] / others, seed=seed)


@dataclass(frozen=True)
class RidgeOnCodes:
    """Ridge regression on an encoding, in dual form: outputs are mean + codes(x) codes(train)^T dual."""

    encoder: Any
    codes: Float[ndarray, "train length"]
    mean: ndarray
    dual: ndarray
    validation_error: float

    def error(self, X: ndarray, y: ndarray, rows: slice) -> float:
        guess = encode(self.encoder, X[rows]) @ self.codes.T @ self.dual + self.mean
        return float(np.mean((guess - y[rows]) ** 2))


def choose_ridge(encoder: Any, X: ndarray, y: ndarray, train: slice, validation: slice) -> RidgeOnCodes:
    """The ridge with the least validation error, all from one spectral decomposition of the kernel matrix."""
    codes = encode(encoder, X[train])
    eigenvalues, V = np.linalg.eigh(codes @ codes.T)
    mean = y[train].mean(axis=0)
    rotated, side = V.T @ (y[train] - mean), encode(encoder, X[validation]) @ codes.T @ V
    best = (np.inf, np.zeros_like(rotated))
    for ridge in np.geomspace(1e-4, 1e1, 6) * eigenvalues.mean():
        weights = rotated / (np.maximum(eigenvalues, 0) + ridge)[:, None]
        best = min(best, (float(np.mean((side @ weights + mean - y[validation]) ** 2)), weights), key=itemgetter(0))
    return RidgeOnCodes(encoder, codes, mean, V @ best[1], best[0])


def encode(encoder: Any, X: ndarray) -> Float[ndarray, "n length"]:
    """Sparse codes are filled in: many images share each node, so that dense products take less time."""
    codes = encoder.transform(X)
    return codes.toarray() if hasattr(codes, "toarray") else codes


# Continuous control ---------------------------------------------------------------------------------------------------


def continuous_control(run: Run, seed: int, *, name: str, steps: int) -> None:
    """Soft actor-critic that plans on each model: mean return of the episodes in the last tenth of the steps."""
    returns = {}
    for method in (LOSSE, ONLINE, REPLAY):
        env = require("gymnasium", "control").make(name)
        agent = control_agent(method, env, seed)
        env.reset(seed=seed)
        rewards = play(agent, env, steps, seed=seed)
        horizon = env.spec.max_episode_steps or 1000
        returns[method] = rewards[-max(steps // 10, 1) :].mean() * horizon
        run.record(method, "return", returns[method], seed=seed, env=name)
    if name.startswith(("HalfCheetah", "Hopper", "Walker2d")):
        ratio = returns[LOSSE] / returns[REPLAY]
        run.record(LOSSE, "return / that with a replayed network model, MuJoCo", ratio, seed=seed, env=name)


def control_agent(method: str, env: Any, seed: int, warm_up: int = 1000) -> DynaAgent:
    spaces = env.observation_space, env.action_space
    if method == LOSSE:
        regressor: Any = LosseFTLRegressor(30, 2, 8, random_state=seed)
    else:
        memory = "replay" if method == REPLAY else "none"
        regressor = NetworkRegressor((200, 200), memory=memory, batch_size=256, random_state=seed)
    model = WorldModel(regressor, *spaces, scaling="warm-up", warm_up=warm_up)
    learner = SoftActorCritic(*spaces, hidden=256, lr=3e-4, generator=torch.Generator().manual_seed(seed))
    return DynaAgent(learner, model, n_planning=10, planning_batch=256, learn_from_real=False, rng=seed)
