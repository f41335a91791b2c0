"""Run the benchmarks, print their ratios, write one JSON file each under `benchmarks/results/`.

python -m benchmarks [WORD ...]     only those whose module name contains one of the words
"""

import importlib
import json
import os
import platform
import sys
from importlib.metadata import distributions
from pathlib import Path

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
    for module in chosen:
        name = module.rsplit("bench_", 1)[1]
        print(f"\n{name}")
        comparisons = importlib.import_module(module).main()
        for comparison in comparisons:
            print(f"  {comparison}", flush=True)
        result = {
            "benchmark": name,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "versions": versions,
            "comparisons": [c.to_dict() for c in comparisons],
        }
        (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
