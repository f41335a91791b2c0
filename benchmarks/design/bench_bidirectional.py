"""The design loop beside its matrix form, the designs beside searches with the same proxy, and growth with the table.

The peer of the loop is the textbook form: designs one after the other, the kernel's column of each at every step.
The peer of the designs is pycma, in an environment of its own. LOCALLY_DATA names the folder that holds tfbind8/.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.design import cma_peer
from benchmarks.harness import Comparison, compare, growth
from locally.design.bidirectional import (
    BDIDesigner,
    BIBDesigner,
    Evolution,
    MaskedLM,
    MotifLandscape,
    OfflineTask,
    SequenceSpace,
    binding_task,
    pretrain,
)

DESIGNS, STEPS = 8, 10


def main() -> list[Comparison]:
    return [*loop(), *growths(), *designs(), *binding()]


def small_model(seed: int = 0) -> MaskedLM:
    model = MaskedLM(4, hidden=48, generator=torch.Generator().manual_seed(seed))
    return model.eval().requires_grad_(False)


def table(n: int) -> tuple[SequenceSpace, np.ndarray, np.ndarray]:
    land = MotifLandscape(0)
    sequences = land.draw(n, 0.35, np.random.default_rng(0))
    return land.space, sequences, land.score(sequences)


def fitted(n: int, **options: object) -> BIBDesigner:
    space, sequences, scores = table(n)
    settings = {"n_designs": DESIGNS, "steps": STEPS, "random_state": 0} | options
    return BIBDesigner(small_model(), space, **settings).fit(sequences, scores)


def matrix_form(designer: BIBDesigner, features: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """One design at a time, both losses by autograd through kernel matrices, gamma fixed at 0.5."""
    n = len(features)
    K = features @ features.T
    alpha = torch.linalg.solve(K + 1e-6 * K.diagonal().mean() * torch.eye(n, dtype=K.dtype), y)
    embedding = designer.embedding()
    ends = []
    for theta in start:
        theta = theta[None].clone().requires_grad_()
        first, second = torch.zeros_like(theta), torch.zeros_like(theta)
        for t in range(1, STEPS + 1):
            h = embedding(theta)
            column = features @ h.T
            forward = (column.T @ alpha - 10).square().sum()
            own = h @ h.T
            c = torch.linalg.solve(own + 1e-6 * own.detach(), torch.full((1, 1), 10.0, dtype=h.dtype))
            backward = (column @ c - y[:, None]).square().mean()
            (g,) = torch.autograd.grad(0.5 * forward + 0.5 * backward, theta)
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g.square()
            step = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
            theta = (theta - 0.1 * step).detach().requires_grad_()
        ends.append(theta.detach()[0])
    return torch.stack(ends)


def loop() -> list[Comparison]:
    results = []
    for n in (1000, 4000):
        designer = fitted(n, gamma=0.5)
        _, sequences, scores = table(n)
        features = designer.features(sequences) - designer.feature_mean_
        y = designer.scores_.forth(scores)
        start = fitted(n, steps=0, gamma=0.5).design().state.theta
        ours = designer.design().state.theta
        apart = float((ours - matrix_form(designer, features, y, start)).abs().max())
        results.append(
            compare(
                f"{DESIGNS} designs, {STEPS} steps, table of {n}",
                ("BIBDesigner", lambda d=designer: d.design()),
                ("one design at a time, matrix form", lambda a=(designer, features, y, start): matrix_form(*a)),
                rounds=3,
                largest_difference_of_logits=apart,
            )
        )
    return results


def growths() -> list[Comparison]:
    def design(n: int) -> Callable[[], object]:
        designer = fitted(n)
        return lambda: designer.design()

    def batch(n: int) -> Callable[[], object]:
        designer = fitted(2000)
        return lambda: designer.design(n)

    return [
        growth("design loop over rows of the table", "BIBDesigner", [1000, 4000, 16000], design),
        growth("design loop over designs", "BIBDesigner", [16, 64, 256], batch),
    ]


def designs() -> list[Comparison]:
    """True median score and seconds on a motif landscape, all on the same fitted proxy and with as many scores."""
    task, corpus = MotifLandscape(0).task()
    model = MaskedLM(4, hidden=48, generator=torch.Generator().manual_seed(0))
    pretrain(model, task.space, corpus, steps=300, batch=64, rate=4e-3, rng=np.random.default_rng(0))
    return against_searches(task, model, "motif landscape", 50)


def against_searches(task: OfflineTask, model: MaskedLM, name: str, steps: int) -> list[Comparison]:
    ours, n = "BIBDesigner", 64
    designer = BIBDesigner(model, task.space, n_designs=n, steps=steps, random_state=0)
    designer.fit(task.sequences, task.scores)
    begin = time.perf_counter()
    found = designer.design()
    seconds = time.perf_counter() - begin
    score = lambda x: designer.scores_.forth(designer.predict(x)).numpy()
    best = task.sequences[np.argsort(-task.scores, kind="stable")[:n]]
    peers: dict[str, Callable[[], np.ndarray]] = {
        "evolution on the same proxy": lambda: Evolution(steps, n)(score, best, 4, n, np.random.default_rng(0)),
    }
    if (search := cma_peer.search()) is not None:
        peers["pycma on the same proxy"] = lambda: search(score, best, 4, n, steps)
    if len(task.scores) <= 5000:
        bdi = BDIDesigner(task.space, n_designs=n).fit(task.sequences, task.scores)
        peers["BDI"] = lambda: task.space.encode(bdi.design().sequences)
    true = task.evaluate(found.sequences).median
    results = []
    for peer, make in peers.items():
        begin = time.perf_counter()
        sequences = make()
        other = time.perf_counter() - begin
        median = task.evaluate(sequences).median
        detail = {"median_ours": true, "median_peer": median}
        results.append(
            Comparison(name, "median true score", true / median, true / median, true / median, ours, peer, detail)
        )
        detail = {"seconds_ours": seconds, "seconds_peer": other}
        ratio = seconds / other
        results.append(Comparison(name, "time of the designs", ratio, ratio, ratio, ours, peer, detail))
    return results


def binding() -> list[Comparison]:
    path = Path(os.environ.get("LOCALLY_DATA", ".")) / "tfbind8" / "SIX6_REF_R1_8mers.tsv.gz"
    if "LOCALLY_DATA" not in os.environ or not path.exists():
        print("  (TFBind8 skipped: LOCALLY_DATA names no folder with tfbind8/)")
        return []
    task = binding_task(path, part="lower half")
    model = MaskedLM(4, hidden=48, generator=torch.Generator().manual_seed(0))
    pretrain(model, task.space, task.sequences, steps=300, batch=64, rate=4e-3, rng=np.random.default_rng(0))
    return against_searches(task, model, "TFBind8, lower half", 100)


if __name__ == "__main__":
    for line in main():
        print(line)
