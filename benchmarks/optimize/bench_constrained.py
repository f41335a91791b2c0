"""AdaSketch-Newton beside SciPy's SLSQP and trust-constr: time to the same KKT residual, evaluations, growth.

a9a is read from the folder that LOCALLY_DATA names (its libsvm/a9a, svmlight text) and left out without it.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

from benchmarks.harness import Comparison, compare, growth
from locally.optimize.constrained import (
    AdaSketchNewton,
    Instance,
    constrained_logistic,
    hock_schittkowski,
    poisson_control,
)
from locally.optimize.constrained.problems import NAMES
from locally.papers.adasketch_newton import SLSQP, TRUST_CONSTR, read_svmlight


def main() -> list[Comparison]:
    academic = [hock_schittkowski(name) for name in NAMES]
    X, y = load_breast_cancer(return_X_y=True)
    regression = [constrained_logistic(StandardScaler().fit_transform(X), 2.0 * y - 1)]
    eps = {"eps_b": 1e-2}
    lines = [
        *against_scipy("14 Hock-Schittkowski problems", academic),
        *against_scipy("constrained logistic regression, breast cancer", regression, **eps),
        compare(
            "Poisson control, 32 x 32 grid",
            ("AdaSketchNewton", work([poisson_control(32)], max_sketches=20_000)),
            ("trust-constr", lambda: TRUST_CONSTR(poisson_control(32))),
            rounds=3,
        ),
        growth(
            "Poisson control over grid points",
            "AdaSketchNewton",
            [16**2, 32**2, 64**2],
            lambda points: work([poisson_control(round(points**0.5))], max_sketches=20_000),
        ),
    ]
    a9a = Path(os.environ.get("LOCALLY_DATA", "")) / "libsvm" / "a9a"
    if "LOCALLY_DATA" in os.environ and a9a.exists():
        lines += against_scipy(
            "constrained logistic regression, a9a", [constrained_logistic(*read_svmlight(a9a))], **eps
        )
    else:
        print("  a9a left out: LOCALLY_DATA names no folder with libsvm/a9a")
    return lines


def against_scipy(name: str, instances: list[Instance], **options: float) -> list[Comparison]:
    ours = ("AdaSketchNewton", work(instances, **options))
    solutions = [AdaSketchNewton(**options).solve(i.problem, i.x0, i.lam0) for i in instances]
    lines = []
    for label, method in (("SLSQP", SLSQP), ("trust-constr", TRUST_CONSTR)):
        endings = [method(i) for i in instances]
        lines.append(compare(name, ours, (label, lambda: [method(i) for i in instances]), rounds=3))  # noqa: B023
        ratio = float(np.median([s.nfev for s in solutions]) / np.median([e.nfev for e in endings]))
        detail = {
            "unsolved_ours": sum(not s.success for s in solutions),
            "unsolved_peer": sum(not e.solved for e in endings),
            "median_kkt_ours": float(np.median([s.kkt for s in solutions])),
            "median_kkt_peer": float(np.median([e.kkt for e in endings])),
        }
        lines.append(Comparison(name, "median function evaluations", ratio, ratio, ratio, ours[0], label, detail))
    return lines


def work(instances: list[Instance], **options: float) -> Callable[[], object]:
    solver = AdaSketchNewton(**options)
    return lambda: [solver.solve(i.problem, i.x0, i.lam0) for i in instances]


if __name__ == "__main__":
    for line in main():
        print(line)
