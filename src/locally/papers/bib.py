"""Designs by both directions, by either alone, by BDI and by searches, on motif landscapes and on measured tables.

On the landscapes a small language model is pretrained in place on unlabelled sequences; the designers see a table of
poor ones. The full-size study adds the tables and pretrained models that a user names. Everything is scored by the
oracle once, after all designs are made.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from scipy.stats import rankdata

from locally.design.bidirectional import (
    CMAES,
    PROTEIN,
    BDIDesigner,
    BIBDesigner,
    CbAS,
    Evolution,
    MaskedLM,
    MotifLandscape,
    OfflineTask,
    OneHotFeatures,
    PretrainedLM,
    Reinforce,
    RidgeEnsemble,
    SequenceModel,
    SequenceSpace,
    binding_task,
    embed,
    pretrain,
    read_table,
)
from locally.evidence import Run

OURS, ETA = "BIB", "BIB, adaptive rate"
FORWARD, FORWARD_ETA = "forward only", "forward only, adaptive rate"
BACKWARD, FIXED = "backward only", "both, fixed at 0.5"
UNTRAINED, ONE_HOT = "BIB, untrained language model", "both, fixed at 0.5, one-hot features"
BDI, BDI_FORWARD = "BDI", "kernel ascent (BDI's network)"
TABLE = "best of the table"
DIFFERENCES = {
    BDI: "median design score minus BDI's",
    UNTRAINED: "median design score minus that with an untrained language model",
    BACKWARD: "median design score minus that of backward only",
    FORWARD: "median design score minus that of forward only",
    FIXED: "median design score minus that of a fixed balance",
}
GAIN = "median design score minus that with a fixed rate"
RANK = "mean rank minus that of the best other method, five tasks"
PROTEINS = ("avgfp", "aav", "e4b")

Setting = dict[str, str | int | float | bool]
Designers = Mapping[str, Callable[[], list[str] | ndarray]]


@dataclass(frozen=True)
class Study:
    """Sizes of one scale.

    Attributes:
        landscapes: for each seed.
        table: sequences measured, of which the lower half is kept.
        corpus: unlabelled sequences.
        pretraining, batch, hidden, rate: of the language model.
        designs, steps: of every designer; searches get as many proxy scores.
        everything: also the variants and searches that no claim needs.
        measured: also the user's tables.
    """

    landscapes: int
    table: int
    corpus: int
    pretraining: int
    batch: int
    hidden: int
    rate: float
    designs: int
    steps: int
    everything: bool
    measured: bool


@dataclass(frozen=True)
class Measured:
    """Sizes on the user's tables; `steps` None are the published ones, 100 for DNA and 25 for proteins."""

    designs: int = 128
    steps: int | None = None
    pretraining: int = 700
    bdi_steps: int = 200


def experiment(run: Run) -> None:
    small: dict[str, Any] = {"hidden": 48, "batch": 64, "rate": 4e-3, "measured": False}
    study = run.pick(
        quick=Study(1, 400, 5000, designs=16, steps=25, pretraining=80, everything=False, **small),
        default=Study(2, 1000, 20_000, designs=64, steps=50, pretraining=450, everything=True, **small),
        paper=Study(2, 1000, 20_000, 700, 128, 128, 2e-3, 64, 50, everything=True, measured=True),
    )
    carry_out(run, study)


def carry_out(run: Run, study: Study) -> None:
    landscapes = [(seed, index) for seed in run.seeds for index in range(study.landscapes)]
    run.parallel(partial(on_landscape, study=study), landscapes, "motif landscapes")
    plot(run)
    if study.measured:
        on_tables(run, Measured())


# Motif landscapes -----------------------------------------------------------------------------------------------------


def on_landscape(run: Run, item: tuple[int, int], study: Study) -> None:
    seed, index = item
    task, corpus = MotifLandscape(seed=1000 * index + seed).task(study.table, study.corpus)
    model = MaskedLM(4, hidden=study.hidden, generator=torch.Generator().manual_seed(seed))
    untrained = MaskedLM(4, hidden=study.hidden, generator=torch.Generator().manual_seed(seed)).eval()
    untrained.requires_grad_(False)
    rng = np.random.default_rng([seed, index])
    size: dict[str, Any] = {"steps": study.pretraining, "batch": study.batch, "rate": study.rate}
    losses = pretrain(model, task.space, corpus, rng=rng, **size)
    model, untrained = model.to(run.device), untrained.to(run.device)
    where: Setting = {"landscape": index}
    run.record(
        "masked language model", "cross-entropy at the end, nats", float(np.mean(losses[-30:])), seed=seed, **where
    )

    options = {"n_designs": study.designs, "steps": study.steps, "random_state": seed}
    designers = gradient_designers(task, model, untrained, study.everything, options)
    if study.everything:
        designers |= searches(task, model, study.designs, study.steps, seed)
    medians = record_all(run, task, designers, seed, where)
    for other, metric in DIFFERENCES.items():
        run.record(OURS, metric, medians[OURS] - medians[other], seed=seed, **where)
    if study.everything:
        gain = medians[FORWARD_ETA] - medians[FORWARD]
        run.record(FORWARD_ETA, GAIN, gain, seed=seed, **where)


def gradient_designers(
    task: OfflineTask,
    model: SequenceModel,
    untrained: SequenceModel | None,
    everything: bool,
    options: dict[str, Any],
    bdi_steps: int = 200,
) -> dict[str, Callable[[], list[str] | ndarray]]:
    def design(model: SequenceModel, **variant: Any) -> list[str]:
        designer = BIBDesigner(model, task.space, **options, **variant)
        return designer.fit(task.sequences, task.scores).design().sequences

    best = task.sequences[np.argsort(-task.scores, kind="stable")[: options["n_designs"]]]
    found: dict[str, Callable[[], list[str] | ndarray]] = {
        OURS: partial(design, model),
        FORWARD: partial(design, model, gamma=1.0),
        FIXED: partial(design, model, gamma=0.5),
        BACKWARD: partial(design, model, gamma=0.0),
        BDI: partial(bdi, task, 0.5, options["n_designs"], bdi_steps),
        TABLE: lambda: best,
    }
    if untrained is not None:
        found[UNTRAINED] = partial(design, untrained)
    if everything:
        found[ETA] = partial(design, model, eta="adaptive")
        found[FORWARD_ETA] = partial(design, model, gamma=1.0, eta="adaptive")
        found[ONE_HOT] = partial(design, OneHotFeatures(), gamma=0.5)
    return found


def bdi(task: OfflineTask, gamma: float, designs: int, steps: int) -> list[str]:
    designer = BDIDesigner(task.space, gamma=gamma, steps=steps, n_designs=designs)
    return designer.fit(task.sequences, task.scores).design().sequences


def searches(
    task: OfflineTask, model: SequenceModel, designs: int, steps: int, seed: int
) -> dict[str, Callable[[], list[str] | ndarray]]:
    """On the proxy that gradient ascent climbs, with as many of its scores."""
    kinds = {"evolution on the proxy": Evolution, "CMA-ES on the proxy": CMAES, "REINFORCE on the proxy": Reinforce}
    kinds |= {"CbAS on the proxy, independent positions": CbAS}

    def search(kind: Any) -> ndarray:
        proxy = BIBDesigner(model, task.space, random_state=seed).fit(task.sequences, task.scores)
        standard = lambda x: proxy.scores_.forth(proxy.predict(x)).numpy()
        start = task.sequences[np.argsort(-task.scores, kind="stable")[:designs]]
        rng = np.random.default_rng([seed, len(task.name)])
        return kind(rounds=steps, population=designs)(standard, start, task.space.letters, designs, rng)

    return {name: partial(search, kind) for name, kind in kinds.items()}


def record_all(run: Run, task: OfflineTask, designers: Designers, seed: int, where: Setting) -> dict[str, float]:
    """Make every design first, ask the oracle after that; the medians."""
    designs = {name: make() for name, make in designers.items()}
    medians = {}
    for name, sequences in designs.items():
        found = task.evaluate(sequences)
        medians[name] = found.median
        for metric, value in found.figures().items():
            run.record(name, metric, value, seed=seed, task=task.name.split()[0], **where)
    return medians


def plot(run: Run) -> None:
    from locally.plots import PALETTE, canvas

    methods = list(dict.fromkeys(m.method for m in run.measures if m.metric == "median score"))
    values = lambda method, metric: [m.value for m in run.measures if m.method == method and m.metric == metric]
    methods.sort(key=lambda method: -np.mean(values(method, "median score")))
    figure, panels = canvas(9.0, 1.4 + 0.34 * len(methods), ncols=2, sharey=True, width_ratios=(3, 2))
    for axes, metrics in zip(panels, (("median score", "best score"), ("diversity", "novelty"))):
        for offset, metric, colour in zip((-0.16, 0.16), metrics, PALETTE if axes is panels[0] else PALETTE[2:]):
            for row, method in enumerate(methods):
                seen = values(method, metric)
                axes.plot(seen, np.full(len(seen), row + offset), ".", color=colour, alpha=0.35, markersize=5)
                label = metric if row == 0 else None
                axes.plot(np.mean(seen), row + offset, "D", color=colour, markersize=6, label=label)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].invert_yaxis()
    panels[0].set(xlabel="true score (best known = 1)", title="Designs on motif landscapes")
    panels[1].set(xlabel="letters", title="How different they are", xlim=(0, None))
    figure.legend(fontsize=8.5, loc="outside lower center", ncols=4)
    caption = (
        "True scores of the designs (median and best), mean Hamming distance between designs (diversity) and to the"
        " nearest sequence of the table (novelty); a dot for each landscape, a diamond for the mean."
    )
    run.figure(figure, "motif-landscapes", caption)


# Measured tables ------------------------------------------------------------------------------------------------------


def on_tables(run: Run, sizes: Measured) -> None:
    """TFBind8, and each of the other four tasks whose table and models are in the data folder.

    models/dnabert and models/protbert hold the language models (for DNA one is trained in place where there is none),
    models/prott5 the one that the proteins' oracle reads; tfbind8/ and tfbind10/ the binding tables, proteins/NAME.csv
    sequences and scores.
    """
    tasks = measured_tasks(run)
    ranks: dict[int, list[dict[str, float]]] = {seed: [] for seed in run.seeds}
    for task, folder in run.track(tasks, "measured tables"):
        steps = sizes.steps or (100 if task.space.letters == 4 else 25)
        for seed in run.seeds:
            model = task_model(run, task, folder, seed, sizes.pretraining)
            options = {"n_designs": sizes.designs, "steps": steps, "random_state": seed, "device": run.device}
            designers = gradient_designers(task, model, None, True, options, sizes.bdi_steps)
            designers |= searches(task, model, sizes.designs, steps, seed)
            designers[BDI_FORWARD] = partial(bdi, task, 1.0, sizes.designs, sizes.bdi_steps)
            medians = record_all(run, task, designers, seed, {})
            gain = medians[FORWARD_ETA] - medians[FORWARD]
            run.record(FORWARD_ETA, GAIN, gain, seed=seed, task=task.name)
            contest = [name for name in designers if name not in (TABLE, ETA)]
            order = rankdata([-medians[name] for name in contest])
            ranks[seed].append(dict(zip(contest, order.tolist())))
            for name, rank in ranks[seed][-1].items():
                run.record(name, "rank by median score", rank, seed=seed, task=task.name)
    if len(tasks) == 2 + len(PROTEINS):
        for seed, by_task in ranks.items():
            mean = {name: float(np.mean([ranking[name] for ranking in by_task])) for name in by_task[0]}
            ours = mean.pop(OURS)
            run.record(OURS, RANK, ours - min(mean.values()), seed=seed)


def measured_tasks(run: Run) -> list[tuple[OfflineTask, Path]]:
    table = run.data("tfbind8/SIX6_REF_R1_8mers.tsv.gz", "binding of SIX6 to all DNA 8-mers")
    models = table.parents[1] / "models"
    tasks = [(binding_task(table, part="lowest"), models / "dnabert")]
    ten = table.parents[1] / "tfbind10" / "x_pho4.npy"
    if ten.exists():
        tasks.append((binding_task(ten, part="lowest"), models / "dnabert"))
    for name in PROTEINS:
        path = table.parents[1] / "proteins" / f"{name}.csv"
        if path.exists() and (models / "prott5").exists() and (models / "protbert").exists():
            reader = PretrainedLM.from_folder(models / "prott5", PROTEIN, device=run.device)
            tasks.append((protein_task(path, reader, run.device), models / "protbert"))
    return tasks


def protein_task(path: Path, reader: SequenceModel, device: str = "cpu") -> OfflineTask:
    """The oracle is a linear model on a large language model's features, fitted to all of the table.

    Offline is the lower half by that oracle.
    """
    sequences, scores = read_table(path, sequence="sequence", score="score", alphabet=PROTEIN)
    space = SequenceSpace.of(PROTEIN, sequences)
    table = space.encode(sequences)

    def features(indices: Int[ndarray, "n length"]) -> torch.Tensor:
        return embed(reader, indices, space.letters, batch=32, device=device)

    known = features(table)
    truth = RidgeEnsemble(1, 1e-4).fit(known, torch.as_tensor(scores, device=known.device), generator=torch.Generator())
    oracle = lambda indices: truth.predict(features(indices)).cpu().numpy()
    y = truth.predict(known).cpu().numpy()
    half = np.argsort(y, kind="stable")[: len(y) // 2]
    return OfflineTask(path.stem, space, table[half], y[half], oracle, float(y.min()), float(y.max()))


def task_model(run: Run, task: OfflineTask, folder: Path, seed: int, pretraining: int) -> SequenceModel:
    if folder.exists():
        return PretrainedLM.from_folder(folder, task.space.alphabet, device=run.device)
    model = MaskedLM(task.space.letters, generator=torch.Generator().manual_seed(seed)).to(run.device)
    pretrain(model, task.space, task.sequences, steps=pretraining, rng=np.random.default_rng(seed))
    return model
