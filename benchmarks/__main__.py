"""Run the benchmarks, print their ratios, write one JSON file each under `benchmarks/results/`.

python -m benchmarks [WORD ...]     only those whose module name contains one of the words

A ratio that is worse than the stored one by more than both spreads is flagged. `python -m benchmarks.table` makes the
documentation's tables and curves of what is stored.
"""

import importlib
import json
import os
import platform
import sys
import traceback
from importlib.metadata import distributions
from pathlib import Path

from benchmarks.harness import Comparison
from benchmarks.table import comparisons

HERE = Path(__file__).parent
PEERS = ("torch", "numpy", "scipy", "scikit-learn", "numba", "pyamg", "captum", "cvxpy", "dp-accounting")
PEERS += ("kmedoids", "pymor", "gymnasium", "triton")


def main(words: list[str]) -> None:
    modules = sorted(".".join(p.relative_to(HERE.parent).with_suffix("").parts) for p in HERE.rglob("bench_*.py"))
    chosen = [m for m in modules if not words or any(w in m for w in words)]
    if not chosen:
        sys.exit(
            f"no benchmark named like {' '.join(words)}; there are {', '.join(m.split('_', 1)[1] for m in modules)}"
        )
    versions = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"] in PEERS}
    (HERE / "results").mkdir(exist_ok=True)
    failed: list[str] = []
    for module in chosen:
        name = module.rsplit("bench_", 1)[1]
        print(f"\n{name}")
        try:
            found = importlib.import_module(module).main()
        except Exception:  # the other benchmarks have a right to their turn
            traceback.print_exc()
            failed.append(name)
            continue
        stored = before(name)
        for comparison in found:
            last = stored.get(_line(comparison))
            worse = last is not None and comparison.worse_than(last)
            print(f"  {comparison}{f'  WORSE than the stored {last.ratio:.3g}' if worse else ''}", flush=True)
        result = {
            "benchmark": name,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "versions": versions,
            "comparisons": [c.to_dict() for c in found],
        }
        (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if failed:
        sys.exit(f"these did not end: {', '.join(failed)}")


def before(name: str) -> dict[tuple[str, ...], Comparison]:
    """What the last stored run of a benchmark found."""
    path = HERE / "results" / f"{name}.json"
    found = comparisons(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []
    return {_line(c): c for c in found}


def _line(c: Comparison) -> tuple[str, ...]:
    """What a figure is of, whenever it was measured."""
    return c.name, c.quantity, c.ours, c.peer


if __name__ == "__main__":
    main(sys.argv[1:])
