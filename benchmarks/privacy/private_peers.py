"""OpenDP and diffprivlib, whose needs clash with the project's: an environment and a process of their own.

Imported, this file gives `elsewhere()`; run by the other environment's interpreter, it answers requests, one JSON
object a line.
"""

import atexit
import json
import subprocess
import sys
import venv
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / ".peers" / "privacy"
PACKAGES = ["diffprivlib==0.6.6", "opendp==0.16.0", "scikit-learn==1.5.2"]


def elsewhere() -> Callable[..., Any] | None:
    """`ask(task, **arguments)` of the peers' process; None, with the reason printed, where they cannot be installed."""
    python = FOLDER / "bin" / "python"
    ready = FOLDER / "ready"
    if not ready.exists() or ready.read_text().split() != PACKAGES:
        print(f"installing {', '.join(PACKAGES)} into {FOLDER}")
        venv.create(FOLDER, with_pip=True)
        installed = subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], capture_output=True, text=True)
        if installed.returncode:
            print(f"OpenDP and diffprivlib are left out: {installed.stderr.strip().splitlines()[-1]}")
            return None
        ready.write_text("\n".join(PACKAGES))
    worker = subprocess.Popen([python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(worker.kill)

    def ask(task: str, **arguments: Any) -> Any:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())

    return ask


def opendp_noise(n: int, scale: float) -> int:
    """Exact discrete Gaussian noise on a vector of n integers."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=int)
    return len(dp.m.make_gaussian(*space, scale=scale)([0] * n))


def diffprivlib_noise(n: int) -> int:
    """Exact discrete Gaussian noise, n integers one by one."""
    mechanism = discrete_gaussian()
    return len([mechanism.randomise(0) for _ in range(n)])


@cache
def discrete_gaussian() -> Any:
    """At (1, 1e-6) and sensitivity 1, a scale of about 4; its own calibration fails at large sensitivities."""
    from diffprivlib.mechanisms import GaussianDiscrete

    return GaussianDiscrete(epsilon=1.0, delta=1e-6, sensitivity=1)


def diffprivlib_regression(table: str, epsilon: float, clip: float, seed: int) -> list[float]:
    """Coefficients for the last column, from a server that sees every record and protects only its answer."""
    import numpy as np
    from diffprivlib.models import LinearRegression

    records = np.clip(np.load(table, allow_pickle=False), -clip, clip)
    bounds = (-clip, clip)
    model = LinearRegression(epsilon=epsilon, bounds_X=bounds, bounds_y=bounds, fit_intercept=False, random_state=seed)
    return model.fit(records[:, :-1], records[:, -1]).coef_.tolist()


if __name__ == "__main__":
    TASKS = {task.__name__: task for task in (opendp_noise, diffprivlib_noise, diffprivlib_regression)}
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(TASKS[request.pop("task")](**request)), flush=True)
