"""Layers that regress values on keys, without training and with: streams whose regression changes, boundaries, recall.

Every layer is tuned on a sample of its own, then measured on another. The boundary study is the estimator alone in one
dimension. State tracking, the only study that trains, is where the method should lose.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, scaled_dot_product_attention, softplus

from locally.evidence import Run
from locally.sequence.local_linear_attention import (
    LocalLinearRegressor,
    delta_rule,
    linear_attention,
    local_linear_attention,
    mesa,
    nadaraya_watson,
)

LLA = "local linear attention"
SOFTMAX, MESA, DELTA = "softmax attention (SDPA)", "MesaNet", "DeltaNet"
POWERS = [2.0**e for e in range(10)]
GRIDS: Mapping[str, tuple[Callable[..., Tensor], dict[str, list[float]]]] = {
    LLA: (local_linear_attention, {"scale": [0.5, *POWERS[:7]], "ridge": [1e-4, 1e-3, 1e-2, 1e-1]}),
    SOFTMAX: (nadaraya_watson, {"scale": POWERS[2:]}),
    MESA: (mesa, {"ridge": [1e-3, 1e-2, 1e-1, 1.0]}),
    DELTA: (delta_rule, {"beta": [0.2, 0.5, 1.0]}),
    "Gated DeltaNet": (delta_rule, {"beta": [0.2, 0.5, 1.0], "decay": [0.9, 0.97, 0.99]}),
    "linear attention with decay": (linear_attention, {"decay": [0.9, 0.97, 0.99, 1.0]}),
}
BASELINES = [name for name in GRIDS if name != LLA]


@dataclass(frozen=True)
class Study:
    """Sizes of one scale."""

    segments: Sequence[int]
    dimensions: Sequence[int] = (16,)  # of the keys
    length: int = 385
    sequences: int = 4
    samples: Sequence[int] = (128, 512)  # of the boundary study
    repetitions: int = 12
    bandwidths: int = 24
    pairs: Sequence[int] = (16, 64)  # to recall
    training_steps: int = 0  # of the state tracking study; 0 leaves it out
    objects: int = 3  # whose permutation is tracked


def experiment(run: Run) -> None:
    carry_out(
        run,
        run.pick(
            quick=Study((1, 2, 8), bandwidths=12),
            default=Study(
                (1, 2, 4, 8),
                samples=(128, 256, 512, 1024),
                bandwidths=12,
                pairs=(8, 16, 32, 64),
                training_steps=250,
            ),
            paper=Study(
                (1, 2, 4, 8, 16),
                dimensions=(16, 64, 128),
                length=4097,
                sequences=16,
                samples=(64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
                repetitions=200,
                pairs=(16, 32, 64, 128, 256),
                training_steps=10_000,
                objects=5,
            ),
        ),
    )


def carry_out(run: Run, study: Study) -> None:
    tasks: list[tuple[Any, ...]] = [
        (stream, study, d, s, seed) for d, s, seed in itertools.product(study.dimensions, study.segments, run.seeds)
    ]
    tasks += [(boundary, study, seed) for seed in run.seeds]
    tasks += [(recall, study, seed) for seed in run.seeds]
    if study.training_steps:
        tasks += [(track_states, study, seed) for seed in run.seeds]
    # the longest first, so that no core is left alone with them
    order = {track_states: 0, boundary: 1, stream: 2, recall: 3}
    run.parallel(do, sorted(tasks, key=lambda task: order[task[0]]), "studies")
    plot(run, study)


def do(run: Run, task: tuple[Any, ...]) -> None:
    study, *arguments = task
    study(run, *arguments)


# Streams whose regression changes -----------------------------------------------------------------------------------


def stream(run: Run, study: Study, d: int, segments: int, seed: int) -> None:
    """Predict the next value from its key and all pairs so far; relative squared error, every layer tuned elsewhere."""
    draw = partial(piecewise_linear, study.sequences, study.length, d, segments, device=run.device)
    tuning, test = draw(rng_of(seed, segments, d, 0)), draw(rng_of(seed, segments, d, 1))
    errors = {}
    for name in GRIDS:
        options, gain = tune(name, tuning, lambda o, v: float(relative_error(o, v)))
        keys, values = test
        errors[name] = float(relative_error(gain * attend(name, keys, values, options), values[:, :, 1:]))
        run.record(name, "relative squared error", errors[name], seed=seed, segments=segments, dimension=d)
    best = min(errors[name] for name in BASELINES)
    plural = "segment" if segments == 1 else "segments"
    if d == 16:
        run.record(LLA, f"error / best baseline's error, {segments} {plural}", errors[LLA] / best, seed=seed)
    else:
        run.record(LLA, f"error / best baseline's error, key dimension {d}", errors[LLA] / best, seed=seed)
    if segments == 1 and d == 16:
        run.record(LLA, "error / MesaNet's error, 1 segment", errors[LLA] / errors[MESA], seed=seed)
        run.record(LLA, "softmax attention's error / error, 1 segment", errors[SOFTMAX] / errors[LLA], seed=seed)


def piecewise_linear(
    sequences: int, length: int, d: int, segments: int, rng: np.random.Generator, device: str
) -> tuple[Float[Tensor, "sequences 1 length d"], Float[Tensor, "sequences 1 length d"]]:
    """Keys of unit norm around one centre a segment, values linear in them by one matrix a segment, and noise."""
    centres = rng.standard_normal((sequences, segments, d))
    centres /= np.linalg.norm(centres, axis=-1, keepdims=True)
    matrices = rng.standard_normal((sequences, segments, d, d)) / np.sqrt(d)
    segment = np.arange(length) * segments // length
    keys = centres[:, segment] + 0.35 * rng.standard_normal((sequences, length, d)) / np.sqrt(d)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    values = np.einsum("btij,btj->bti", matrices[:, segment], keys)
    values += 0.05 * rng.standard_normal(values.shape) / np.sqrt(d)
    as_heads = lambda x: torch.from_numpy(x).unsqueeze(1).to(device)
    return as_heads(keys), as_heads(values)


def attend(name: str, keys: Tensor, values: Tensor, options: Mapping[str, float]) -> Tensor:
    """Predictions of values 1, 2, ...: the query is the next key."""
    layer = GRIDS[name][0]
    enough = {"max_iter": 8 * keys.shape[-1]} if name == LLA else {}  # where it takes conjugate gradients, to the end
    q, k, v = (x.contiguous() for x in (keys[:, :, 1:], keys[:, :, :-1], values[:, :, :-1]))
    return layer(q, k, v, **options, **enough)


def tune(
    name: str, sample: tuple[Tensor, Tensor], loss: Callable[[Tensor, Tensor], float]
) -> tuple[dict[str, float], float]:
    """The point of the layer's grid with the smallest loss; linear attention also gets the best gain of its output."""
    keys, values = sample
    best = np.inf
    choice: tuple[dict[str, float], float] = ({}, 1.0)
    grid = GRIDS[name][1]
    for point in itertools.product(*grid.values()):
        options = dict(zip(grid, point))
        o = attend(name, keys, values, options)
        wanted = values[:, :, 1:]
        gain = float((o * wanted).sum() / o.square().sum()) if name.startswith("linear") else 1.0
        found = loss(gain * o, wanted)
        if found < best:
            best, choice = found, (options, gain)
    return choice


def relative_error(o: Float[Tensor, "b 1 n d"], wanted: Float[Tensor, "b 1 n d"]) -> Float[Tensor, ""]:
    """Over targets from number d on, as many as a linear fit needs."""
    d = wanted.shape[-1]
    o, wanted = o[:, :, d - 1 :], wanted[:, :, d - 1 :]
    return (o - wanted).square().sum() / wanted.square().sum()


# Boundary bias in one dimension -------------------------------------------------------------------------------------


def boundary(run: Run, study: Study, seed: int) -> None:
    """Integrated squared errors of local linear and local constant regression, both at their best bandwidth."""
    grid = np.linspace(0, 1, 201)
    truth = np.sin(3 * grid) + 0.5 * grid
    bandwidths = np.geomspace(0.01, 0.5, study.bandwidths)
    integrated, edges = [], []
    for n in study.samples:
        rng = rng_of(seed, n, 2)
        squares = np.zeros((2, len(bandwidths), len(grid)))
        for _ in range(study.repetitions):
            x = rng.uniform(size=n)
            y = np.sin(3 * x) + 0.5 * x + 0.3 * rng.standard_normal(n)
            for at, h in enumerate(bandwidths):
                linear = LocalLinearRegressor(h, ridge=1e-9).fit(x[:, None], y).predict(grid[:, None])
                gaps = linear - truth, local_constant(x, y, grid, h) - truth
                squares[:, at] += np.square(gaps) / study.repetitions
        mean = squares.mean(-1)
        ends = squares[:, :, [0, -1]].mean(-1)
        for row, method in enumerate((LLA, "local constant regression")):
            best = mean[row].argmin()
            run.record(method, "integrated squared error", mean[row, best], seed=seed, samples=n)
            run.record(method, "squared error at the ends", ends[row, best], seed=seed, samples=n)
            run.record(method, "best bandwidth", bandwidths[best], seed=seed, samples=n)
        if n >= 128:
            integrated.append(mean[0].min() / mean[1].min())
            edges.append(ends[1, mean[1].argmin()] / ends[0, mean[0].argmin()])
    run.record(LLA, "largest integrated error / local constant regression's error", max(integrated), seed=seed)
    run.record(LLA, "smallest local constant error at the ends / error", min(edges), seed=seed)


def local_constant(x: np.ndarray, y: np.ndarray, grid: np.ndarray, h: float) -> np.ndarray:
    """Nadaraya and Watson's estimate with the same Gaussian weights."""
    logits = np.square(grid[:, None] - x) / (-2 * h**2)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights @ y / weights.sum(1)


# Associative recall ---------------------------------------------------------------------------------------------------


def recall(run: Run, study: Study, seed: int) -> None:
    """Which of 64 symbols was stored with a key, asked for with a noisy copy of it: 32 dimensions, no training."""
    accuracies: dict[str, float] = {}
    for pairs in study.pairs:
        draws = [Memory.draw(pairs, rng_of(seed, pairs, 3, part), run.device) for part in (0, 1)]
        for name, (_, grid) in GRIDS.items():
            points = [dict(zip(grid, point)) for point in itertools.product(*grid.values())]
            best = max(points, key=lambda options: draws[0].accuracy(name, options))
            accuracies[name] = draws[1].accuracy(name, best)
            run.record(name, "recall accuracy", accuracies[name], seed=seed, pairs=pairs)
    gap = accuracies[LLA] - max(accuracies[name] for name in BASELINES)
    run.record(LLA, "recall: accuracy minus best baseline's, most pairs", gap, seed=seed)


@dataclass(frozen=True)
class Memory:
    """Sequences of pairs of a key and the code of a symbol, and as many queries: noisy copies of the keys."""

    keys: Float[Tensor, "b 1 pairs d"]
    queries: Float[Tensor, "b 1 pairs d"]
    codes: Float[Tensor, "symbols d"]
    symbols: Int[Tensor, "b pairs"]

    @classmethod
    def draw(cls, pairs: int, rng: np.random.Generator, device: str, d: int = 32, sequences: int = 8) -> "Memory":
        normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape)).to(device)
        keys = normalize(normal(sequences, 1, pairs, d), dim=-1)
        queries = normalize(keys + 0.3 * normal(sequences, 1, pairs, d) / d**0.5, dim=-1)
        codes = normalize(normal(64, d), dim=-1)
        return cls(keys, queries, codes, torch.from_numpy(rng.integers(0, 64, (sequences, pairs))).to(device))

    def accuracy(self, name: str, options: Mapping[str, float]) -> float:
        """Share of queries whose nearest code is the right one; no query sees another."""
        values = self.codes[self.symbols].unsqueeze(1)
        layer = GRIDS[name][0]
        if name == LLA:
            o = layer(self.queries, self.keys, values, is_causal=False, **options)
        elif name == SOFTMAX:
            o = scaled_dot_product_attention(self.queries, self.keys, values, scale=options["scale"])
        else:  # recurrent: the queries come after the pairs, with pairs of zeros that leave the state as it is
            pairs = self.keys.shape[2]
            after = lambda x: torch.cat([x, torch.zeros_like(x)], 2)
            steps: dict[str, Any] = dict(options)
            if "decay" in options:
                steps["decay"] = torch.tensor([options["decay"]] * pairs + [1.0] * pairs).unsqueeze(-1)
            padded = torch.cat([torch.zeros_like(self.queries), self.queries], 2)
            o = layer(padded, after(self.keys), after(values), **steps)[:, :, pairs:]
        return float(((o.squeeze(1) @ self.codes.T).argmax(-1) == self.symbols).double().mean())


# State tracking -------------------------------------------------------------------------------------------------------


class Tracker(nn.Module):
    """One layer of a kind, one MLP: reads transpositions, says where the permutation is after each."""

    def __init__(self, kind: str, objects: int, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        tokens = objects * (objects - 1) // 2
        self.embed = nn.Embedding(tokens, width)
        self.place = nn.Embedding(64, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rows = nn.Linear(width, heads)  # beta of the delta rule
        self.scale, self.ridge = nn.Parameter(torch.full((heads, 1), 4.0)), nn.Parameter(torch.full((heads, 1), -2.0))
        self.mlp = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, objects))

    def forward(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n objects"]:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        scale = softplus(self.scale)
        if self.kind == LLA:
            o = local_linear_attention(q, k, v, scale=scale, ridge=softplus(self.ridge), solver="cg")
        elif self.kind == SOFTMAX:
            o = nadaraya_watson(scale.unsqueeze(-1) * q, k, v, scale=1.0)
        else:
            o = delta_rule(q, k, v, beta=2 * self.rows(x).sigmoid().mT)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return self.mlp(x)


def track_states(run: Run, study: Study, seed: int) -> None:
    """Where the first object is after each of 16 random transpositions; the delta rule can reflect, the others not."""
    accuracies = {}
    for kind in (LLA, SOFTMAX, DELTA):
        torch.manual_seed(seed)
        rng = rng_of(seed, 4)
        model = Tracker(kind, study.objects).to(run.device)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(study.training_steps):
            tokens, places = words(64, 16, study.objects, rng, run.device)
            optimizer.zero_grad()
            cross_entropy(model(tokens).flatten(0, 1), places.flatten()).backward()
            optimizer.step()
        with torch.no_grad():
            tokens, places = words(512, 16, study.objects, rng_of(seed, 5), run.device)
            accuracies[kind] = float((model(tokens).argmax(-1) == places)[:, -8:].double().mean())
        run.record(kind, "state tracking accuracy", accuracies[kind], seed=seed, objects=study.objects)
    run.record(LLA, "state tracking: accuracy / DeltaNet's", accuracies[LLA] / accuracies[DELTA], seed=seed)


def words(
    count: int, length: int, objects: int, rng: np.random.Generator, device: str
) -> tuple[Int[Tensor, "count length"], Int[Tensor, "count length"]]:
    """Transpositions as tokens, and the place of the first object after each."""
    swaps = np.array(list(itertools.combinations(range(objects), 2)))
    tokens = rng.integers(0, len(swaps), (count, length))
    place, places = np.zeros(count, int), np.empty((count, length), int)
    for t in range(length):
        a, b = swaps[tokens[:, t]].T
        place = np.where(place == a, b, np.where(place == b, a, place))
        places[:, t] = place
    return torch.from_numpy(tokens).to(device), torch.from_numpy(places).to(device)


def rng_of(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


# Figure ---------------------------------------------------------------------------------------------------------------


def plot(run: Run, study: Study) -> None:
    from locally.plots import INK, PALETTE, canvas

    figure, panels = canvas(11.4, 3.8, ncols=3)
    wanted = (
        ("relative squared error", "segments", "Streams that change", "segments of the stream"),
        ("integrated squared error", "samples", "One dimension, best bandwidths", "samples"),
        ("recall accuracy", "pairs", "Associative recall, no training", "pairs stored"),
    )
    colours = dict(zip([*GRIDS, "local constant regression"], [*PALETTE[:6], PALETTE[7]]))
    for axes, (metric, x, title, label) in zip(panels, wanted):
        points: dict[str, dict[float, list[float]]] = {}
        for m in run.measures:
            if m.metric == metric and m.setting.get("dimension", study.dimensions[0]) == study.dimensions[0]:
                points.setdefault(m.method, {}).setdefault(float(m.setting[x]), []).append(m.value)
        for method, values in points.items():
            at = sorted(values)
            line = {"color": colours[method], "lw": 2.2 if method == LLA else 1.3, "marker": "o", "markersize": 3.5}
            axes.plot(at, [np.mean(values[p]) for p in at], label=method, **line)
            low, high = ([f(values[p]) for p in at] for f in (min, max))
            axes.fill_between(at, low, high, color=colours[method], alpha=0.15, lw=0)
        axes.set(xscale="log", title=title, xlabel=label, ylabel=metric)
        axes.set_xticks(at, [f"{p:g}" for p in at], rotation=45 if len(at) > 5 else 0)
        axes.minorticks_off()
        if metric != "recall accuracy":
            axes.set_yscale("log")
    handles = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, labelcolor=INK, fontsize=8.5)
    caption = (
        "Mean over seeds, band from the lowest to the highest. Left: error of predicting the next value of a stream"
        " whose linear map changes between segments. Middle: local linear and local constant regression, each at its"
        " best bandwidth. Right: share of symbols recalled from noisy keys of 32 dimensions."
    )
    run.figure(figure, "regression-and-recall", caption)
